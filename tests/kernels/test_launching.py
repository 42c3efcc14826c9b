"""On which device Triton kernels are launched, in a process of its own (see device_triton_cases.py)."""

import pytest
from interpreter import run_in_interpreter

pytest.importorskip("triton")


def test_every_launch_is_made_on_the_device_of_its_tensors():
    run_in_interpreter("device_triton_cases.py")
