import json
import os
import subprocess
import sys

import pytest

import children
from pairs import QUICK, TEXTS, heal, weights
from reattend.errors import Refusal


def together(student, out, teacher, run=None, **settings):
    """Heal in two processes; return their exit codes."""
    options = {"teacher": teacher, "settings": QUICK | settings, **TEXTS, **(run or {})}
    return children.together("heal", student, out, **options)[0]


def check_alike(one, two, student):
    """The same within rounding: of the losses, and of what was learned."""
    found = [json.loads((out / "reattend.json").read_text())["findings"][-1] for out in (one, two)]
    for name in found[0]["curve"]:
        assert found[1]["curve"][name] == pytest.approx(found[0]["curve"][name], rel=2e-5), name
    assert found[1]["selection_perplexity"] == pytest.approx(found[0]["selection_perplexity"], rel=1e-4)
    before, first, second = (weights(folder) for folder in (student, one, two))
    for name in before:
        learned = (first[name].float() - before[name].float()).norm()
        # Numbers near a rounding edge of bf16 may fall to either side.
        assert (first[name].float() - second[name].float()).norm() <= 0.05 * learned, name


def test_torchrun(student, teacher, tmp_path):
    settings = [f"--set={key}={value}" for key, value in QUICK.items() if key not in ("window", "selection_windows")]
    options = ["--teacher", teacher, "--text", TEXTS["text"], "--selection", TEXTS["selection"], *settings]
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(children.free_port())]
    done = subprocess.run(
        [sys.executable, *command, "-m", "reattend", "heal", student, tmp_path / "two", *options,
         "--window", "32", "--selection-windows", "3", "--json"],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["findings"][0]["kept_step"]  # one report, of the first process
    heal(student, tmp_path / "one", teacher)
    check_alike(tmp_path / "one", tmp_path / "two", student)


@pytest.mark.parametrize(
    "settings",
    [
        {"new": ["*.mlp.*"], "new_steps": 3, "labels": 0.5, "micro_batch": 1},
        {
            "kl": 0.0,
            "hidden": 1.0,
            "outliers": 0.1,
            "outlier_limit": 0.5,
        },  # the head and the last norm get no gradient
        {"shard": True, "hidden": 0.1, "recompute": True, "new": ["*.mlp.*"], "new_steps": 2},
    ],
    ids=["phases", "unused-head", "shard"],
)
def test_two_processes_are_as_one(student, teacher, tmp_path, settings):
    assert together(student, tmp_path / "two", teacher, **settings) == [0, 0]
    heal(student, tmp_path / "one", teacher, **settings)
    check_alike(tmp_path / "one", tmp_path / "two", student)


@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_resume_exactly(student, teacher, tmp_path, shard):
    """What one process stopped at is gone on with by two, and by two again from their own state."""
    settings = {"steps": 4, "save_every": 1, "shard": shard}
    assert together(student, tmp_path / "whole", teacher, **settings) == [0, 0]
    stopped = {"resume": True, "progress": StopAt(3 * 4 * 32)}
    assert together(student, tmp_path / "parts", teacher, stopped, **settings) == [1, 1]
    assert (tmp_path / ".parts.partial/work/scratch/state.safetensors").exists()
    assert together(student, tmp_path / "parts", teacher, {"resume": True}, **settings) == [0, 0]
    for file in ("model.safetensors", "reattend.json"):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


class StopAt:
    """Progress that ends the run once so many tokens were trained on; a class, to be sent to other processes."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __call__(self, phase, done, total, note=""):
        if phase == "healing" and done >= self.tokens:
            raise KeyboardInterrupt


def test_what_several_processes_cannot_do(student, teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr("reattend.processes.join", lambda device: None)
    monkeypatch.setattr("reattend.processes.agree", lambda value: value)
    with pytest.raises(Refusal, match="batch: 4 windows can't be shared evenly by 3 processes"):
        heal(student, tmp_path / "out", teacher)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(Refusal, match="ACCELERATE_USE_FSDP is set: use torchrun, and shard: true"):
        heal(student, tmp_path / "out", teacher, batch=3)
    monkeypatch.setattr("reattend.pipeline.execution.check_device", lambda device: None)
    with pytest.raises(Refusal, match=r"several processes take cpu, or cuda"):
        heal(student, tmp_path / "out", teacher, {"device": "cuda:1"})
    assert not any(tmp_path.iterdir())
