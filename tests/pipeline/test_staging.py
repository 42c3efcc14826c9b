"""What an interrupted, refused or competing run leaves behind."""

import shutil
from pathlib import Path

import pytest

import reattend
from children import CONTEXT, apply_and_die
from reattend.checkpoint.staging import Staging
from reattend.errors import Failure, Refusal


class Stopped(Exception):
    pass


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def interrupted(model, out, groups=5):
    calls = []

    def stop(phase, done, total):
        calls.append(phase)
        if len(calls) == groups:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reattend.apply("int8", model, out, progress=stop)


def test_no_flag_takes_the_folder_of_a_live_run(models, sound, tmp_path):
    def second(phase, done, total):
        for flags in ({"overwrite": True}, {"resume": True}, {"resume": True, "overwrite": True}):
            with pytest.raises(Refusal, match="another run"):
                reattend.apply("int8-bitsandbytes", models("llama"), tmp_path / "out", **flags)

    reattend.apply("int8", models("llama"), tmp_path / "out", progress=second)
    assert contents(tmp_path / "out") == contents(sound)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_is_not_ours_is_never_touched(models, tmp_path):
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old/precious").touch()
    reattend.apply("int8", models("llama"), tmp_path / "out")
    reattend.apply("int8", models("llama"), tmp_path / "out", overwrite=True)
    assert (tmp_path / ".out.old/precious").exists()
    (tmp_path / ".next.partial").mkdir()
    (tmp_path / ".next.partial/mine").touch()
    (tmp_path / ".file.partial").touch()
    (tmp_path / ".link.partial").symlink_to(tmp_path / ".next.partial")
    for name in ("next", "file", "link"):
        for flags in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(Refusal, match="is not ours"):
                reattend.apply("int8", models("llama"), tmp_path / name, **flags)
        assert not (tmp_path / name).exists()
    assert (tmp_path / ".next.partial/mine").exists()


@pytest.mark.parametrize("journal", [b"garbage\n", b"\xff\xff\n", b"[1, 2\n"])
def test_a_damaged_journal_is_refused_and_can_be_overwritten(models, sound, tmp_path, journal):
    interrupted(models("llama"), tmp_path / "out")
    (tmp_path / ".out.partial/journal.jsonl").write_bytes(journal)
    with pytest.raises(Refusal, match=r"journal\.jsonl: is damaged"):
        reattend.apply("int8", models("llama"), tmp_path / "out", resume=True)
    reattend.apply("int8", models("llama"), tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == contents(sound)


def test_a_resumed_run_says_first_what_was_done(models, tmp_path, monkeypatch):
    monkeypatch.setattr("reattend.checkpoint.staging._SYNC_BYTES", 1)
    whole, rest = [], []
    reattend.apply("int8", models("llama"), tmp_path / "whole", progress=lambda *told: whole.append(told))
    interrupted(models("llama"), tmp_path / "out", groups=6)
    reattend.apply("int8", models("llama"), tmp_path / "out", resume=True, progress=lambda *told: rest.append(told))
    assert whole[0] == ("rewriting", 0, whole[-1][2])
    assert rest == whole[5:]


def test_a_link_is_followed(models, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for overwrite in (False, True):
        reattend.apply("int8", models("llama"), tmp_path / "link", overwrite=overwrite)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real/config.json").exists()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(Refusal, match="leads nowhere"):
        reattend.apply("int8", models("llama"), tmp_path / "loop")
    (tmp_path / "dead").symlink_to(tmp_path / "absent/out")
    with pytest.raises(Refusal, match="no such folder"):
        reattend.apply("int8", models("llama"), tmp_path / "dead")
    with pytest.raises(Refusal, match="name too long"):
        reattend.apply("int8", models("llama"), tmp_path / ("x" * 250))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dead", "link", "loop", "real"]


def test_files_named_as_our_own_are_copied(models, tmp_path):
    folder = shutil.copytree(models("llama"), tmp_path / "in")
    odd = ("journal.jsonl", "work/notes.txt", "out/x", "replaced", "recipe.txt")
    for name in odd:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(name.encode())
    reattend.apply("int8", folder, tmp_path / "out")
    assert all((tmp_path / "out" / name).read_bytes() == name.encode() for name in odd)


@pytest.mark.parametrize("replace", [False, True])
def test_a_kill_inside_the_commit_loses_nothing(models, sound, tmp_path, replace):
    whole = contents(sound)
    for step in range(4):
        out = tmp_path / f"out{step}"
        if replace:
            shutil.copytree(sound, out)
            (out / "old").touch()
        child = CONTEXT.Process(target=apply_and_die, args=(models("llama"), out, step))
        child.start()
        child.join()
        assert child.exitcode == 9
        reattend.apply("int8", models("llama"), out, resume=True, overwrite=replace)
        assert contents(out) == whole
        assert not (tmp_path / f".{out.name}.partial").exists()


def test_a_finished_run_is_only_renamed_when_resumed(models, tmp_path, monkeypatch):
    monkeypatch.setattr(Staging, "discard", lambda self: None)
    monkeypatch.setattr(Path, "rename", lambda self, target: (_ for _ in ()).throw(OSError(5, "broken")))
    monkeypatch.setattr("reattend.checkpoint.staging.write_whole", lambda path, data: path.write_bytes(data))
    with pytest.raises(Failure, match="--resume"):
        reattend.apply("int8", models("llama"), tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr("reattend.pipeline.execution.stream", None)  # a second rewrite would fail
    reattend.apply("int8", models("llama"), tmp_path / "out", resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
