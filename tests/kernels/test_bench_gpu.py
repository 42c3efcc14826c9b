"""The GPU benchmark, tried out in Triton's interpreter: it must not rot where there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "gpu"


def test_the_script_checks_and_times_every_kernel():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, SCRIPT, "--small", "--runs", "1"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "24 int8 variants are right" in done.stdout
    assert "3 mla variants are right" in done.stdout
    assert "8 attention variants are right" in done.stdout
    assert "8 shared variants are right" in done.stdout
    assert "4 dictionary variants are right" in done.stdout


def test_without_a_gpu_it_says_so():
    done = subprocess.run(
        [sys.executable, SCRIPT],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "finds no GPU" in done.stderr
