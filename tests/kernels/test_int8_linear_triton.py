"""The Triton kernels in Triton's interpreter, in a process of its own (see int8_triton_cases.py)."""

import pytest
import torch
from interpreter import run_in_interpreter

from reattend.kernels.int8_linear import int8_linear

pytest.importorskip("triton")


def test_every_variant_in_the_interpreter():
    printed = run_in_interpreter("int8_triton_cases.py")
    assert "cases" in printed


def test_triton_on_the_cpu_without_the_interpreter_is_refused():
    x = torch.randn(2, 32)
    with pytest.raises(RuntimeError, match="triton"):
        int8_linear(x, torch.ones(4, 32, dtype=torch.int8), torch.ones(4), backend="triton")
