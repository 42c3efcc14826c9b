"""The Triton kernels in Triton's interpreter, in a process of its own (see int8_triton_cases.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reattend.kernels.int8_linear import int8_linear

pytest.importorskip("triton")


def test_every_variant_in_the_interpreter():
    script = Path(__file__).with_name("int8_triton_cases.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1"}
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "cases" in run.stdout


def test_triton_on_the_cpu_without_the_interpreter_is_refused():
    x = torch.randn(2, 32)
    with pytest.raises(RuntimeError, match="triton"):
        int8_linear(x, torch.ones(4, 32, dtype=torch.int8), torch.ones(4), backend="triton")
