"""On which device Triton kernels are launched, in a process of its own (see device_triton_cases.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_every_launch_is_made_on_the_device_of_its_tensors():
    script = Path(__file__).with_name("device_triton_cases.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
