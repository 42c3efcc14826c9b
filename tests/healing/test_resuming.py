import os
import signal
import time

import pytest

from children import CONTEXT, heal_slowly
from pairs import QUICK, TEXTS, disturb, heal
from reattend.errors import Failure, Refusal
from reattend.healing import loop
from reattend.healing.states import States

# Both phases, best weights that change, and an evaluation more often than a save.
SETTINGS = {"steps": 10, "new": ["*.mlp.*"], "new_steps": 4, "evaluate_every": 2, "save_every": 3, "hidden": 0.1}


def written(state):
    try:
        return state.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def undisturbed(student, teacher, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    return out, heal(student, out, teacher, **SETTINGS)


def test_killed_again_and_again(student, teacher, tmp_path, undisturbed):
    expected, found = undisturbed
    assert len(found["curve"]["loss"]) == 10
    out = tmp_path / "out"
    run = {"teacher": teacher, "settings": QUICK | SETTINGS, **TEXTS}
    state = tmp_path / ".out.partial" / "work" / "scratch" / "state.safetensors"
    kills, resumed = 0, set()
    while not out.exists():
        ours, theirs = CONTEXT.Pipe()
        child = CONTEXT.Process(target=heal_slowly, args=(student, out, run, theirs))
        before = written(state)
        child.start()
        ours.recv()
        resumed.add(before)
        # Each run gets one state further, and some way beyond it.
        while child.is_alive() and written(state) in (0, before):
            time.sleep(0.01)
        child.join(0.04 * kills)
        child.kill()
        child.join()
        kills += child.exitcode == -signal.SIGKILL
        assert child.exitcode in (0, -signal.SIGKILL)
    assert kills >= 2
    assert len(resumed) >= 3  # two runs at least went on from a state
    assert contents(out) == contents(expected)
    assert not (tmp_path / ".out.partial").exists()


@pytest.fixture
def interrupted(student, teacher, tmp_path, monkeypatch):
    """A run that was stopped in step 8: its state is that of step 6."""
    calls = iter(range(100))

    def step(self, number, old=loop.Trainer._step):
        if next(calls) == 7:
            raise KeyboardInterrupt
        return old(self, number)

    monkeypatch.setattr(loop.Trainer, "_step", step)
    with pytest.raises(KeyboardInterrupt):
        heal(student, tmp_path / "out", teacher, **SETTINGS)
    return tmp_path / "out"


def test_it_goes_on_from_the_state(interrupted, student, teacher, undisturbed, monkeypatch):
    steps = []

    def step(self, number, old=loop.Trainer._step):
        steps.append(number)
        return old(self, number)

    monkeypatch.setattr(loop.Trainer, "_step", step)
    assert heal(student, interrupted, teacher, {"resume": True}, **SETTINGS) == undisturbed[1]
    assert steps == [6, 7, 8, 9]
    assert contents(interrupted) == contents(undisturbed[0])


def test_another_run_is_refused(interrupted, student, teacher, tmp_path):
    other = disturb(teacher, tmp_path / "other", 0.1)
    with pytest.raises(Refusal, match="interrupted run had another recipe"):
        heal(student, interrupted, other, {"resume": True}, **SETTINGS)
    with pytest.raises(Refusal, match="interrupted run had another recipe"):
        heal(student, interrupted, teacher, {"resume": True}, **SETTINGS | {"learning_rate": 1e-3})
    with pytest.raises(Refusal, match="interrupted run is there"):
        heal(student, interrupted, teacher, **SETTINGS)


def test_a_teacher_that_changed_is_refused(interrupted, student, teacher):
    weights = teacher / "model.safetensors"
    os.utime(weights, ns=(time.time_ns(), time.time_ns()))
    with pytest.raises(Refusal, match="interrupted run had another teacher"):
        heal(student, interrupted, teacher, {"resume": True}, **SETTINGS)


def test_a_damaged_state_is_named(interrupted, student, teacher):
    (state,) = interrupted.parent.rglob("state.safetensors")
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(Failure, match=r"state\.safetensors: is damaged .*--overwrite"):
        heal(student, interrupted, teacher, {"resume": True}, **SETTINGS)


def test_best_weights_of_a_later_evaluation_do_not_stand_in(interrupted):
    """Killed after step 8 was the best, before the state that says so: the run goes on from step 6 and its best."""
    (folder,) = interrupted.parent.rglob("scratch")
    (folder / "best-8.safetensors").write_bytes(b"of the future")
    record = States(folder, main=True).load_record()
    assert (record.step, len(record.curve)) == (6, 6)
    assert [file.name for file in folder.glob("best-*")] == [f"best-{record.best}.safetensors"]


def test_a_full_disk_keeps_the_last_state(student, teacher, tmp_path, monkeypatch, undisturbed):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    def save(self, record, *arguments, old=States.save):
        if record.step == 6:
            monkeypatch.setattr("reattend.healing.states.tensor_bytes", full)
        old(self, record, *arguments)

    monkeypatch.setattr(States, "save", save)
    with pytest.raises(Failure, match=r"No space left on device.*kept"):
        heal(student, tmp_path / "out", teacher, **SETTINGS)
    monkeypatch.undo()
    heal(student, tmp_path / "out", teacher, {"resume": True}, **SETTINGS)
    assert contents(tmp_path / "out") == contents(undisturbed[0])


def test_finished_training_is_not_done_again(student, teacher, tmp_path, monkeypatch):
    from reattend.pipeline import execution

    stream = execution.stream
    monkeypatch.setattr(execution, "stream", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        heal(student, tmp_path / "out", teacher, **SETTINGS)
    assert not list(tmp_path.rglob("state.safetensors"))  # its disk space is free again
    monkeypatch.setattr(execution, "stream", stream)
    monkeypatch.setattr(loop.Trainer, "run", lambda *arguments: 1 / 0)
    heal(student, tmp_path / "out", teacher, {"resume": True}, **SETTINGS)
    assert (tmp_path / "out" / "config.json").exists()
