import errno
import functools
import hashlib
import json
import os
import random
import resource
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import reattend
from children import CONTEXT, apply_slowly
from reattend.checkpoint import staging
from reattend.checkpoint.index import open_checkpoint
from reattend.errors import Failure, Refusal, first_line
from reattend.pipeline import execution, verification
from reattend.recipes.schema import load_recipe
from tiny_models import write_model


def digest(folder: Path) -> dict[str, str]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


LOADED = {
    "int8": ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "opt", "bert"),
    "int8-weights": ("llama", "qwen2", "phi3", "opt", "bert"),
    "int8-bitsandbytes": ("llama", "qwen2", "opt", "bert"),
}


@pytest.fixture(scope="module")
def probed(models, tmp_path_factory):
    """Plans, problems and logits errors by recipe and family: as `verify` finds them, one process for a recipe."""

    @functools.cache
    def get(recipe):
        place = tmp_path_factory.mktemp(recipe)
        planned = {family: reattend.apply(recipe, models(family), place / family) for family in LOADED[recipe]}
        sources = {f"source of {family}": models(family) for family in planned}
        ids = verification._token_ids(open_checkpoint(models("llama")), models("llama"))
        problems = verification._probe({**sources, **{family: place / family for family in planned}}, ids, place)
        assert not any(problems[name] for name in sources)
        errors = {f: verification._errors(place / f"{f}.pt", place / f"source of {f}.pt")[0] for f in planned}
        return place, planned, problems, errors

    return get


@pytest.mark.parametrize(("recipe", "family"), [(r, family) for r, families in LOADED.items() for family in families])
def test_output_loads_strictly_in_stock_transformers(probed, family, recipe):
    place, planned, problems, errors = probed(recipe)
    assert problems[family] == []
    assert 0 < errors[family] < 0.05
    assert planned[family].summary()["bytes_after"] == sum(
        t.nbytes for t in load_file(place / family / "model.safetensors").values()
    )


def test_verify_says_what_its_probe_finds(models, probed):
    place, *_, errors = probed("int8")
    report = reattend.verify(place / "llama", against=models("llama"))
    assert (report["problems"], report["tokens"]) == ([], 32)
    assert report["logits_error"] == pytest.approx(errors["llama"], rel=1e-6)


def test_every_other_byte_is_kept(tmp_path):
    folder = write_model("llama", tmp_path / "in", max_shard_size="20KB")
    shard = sorted(folder.glob("*.safetensors"))[-1]
    extra = {
        "unknown.extra": torch.arange(5),
        "half": torch.ones(3).half(),
        "tiny": torch.ones(7).to(torch.float8_e4m3fn),
    }
    save_file({k: v.clone() for k, v in load_file(shard).items()} | extra, shard, {"format": "pt"})
    reattend.apply(load_recipe("int8").model_copy(update={"max_shard_bytes": 15_000}), folder, tmp_path / "out")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    out = {k: v for f in set(index["weight_map"].values()) for k, v in load_file(tmp_path / "out" / f).items()}
    source = {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in out.values())
    assert set(index["weight_map"]) == set(out)
    for name, tensor in source.items():
        if out[name].dtype != torch.int8:
            assert torch.equal(out[name].view(torch.uint8).flatten(), tensor.reshape(-1).view(torch.uint8)), name
        else:
            assert torch.equal(out[name], torch.round(tensor.double() / out[name + "_scale"].double()).to(torch.int8))
    assert (tmp_path / "out/notes/extra.txt").read_bytes() == b"kept \xff as it is"
    assert (tmp_path / "out/generation_config.json").read_bytes() == (folder / "generation_config.json").read_bytes()
    config, before = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "out", folder))
    assert config.pop("quantization_config")
    assert config == before


def test_what_is_no_file_is_not_copied_and_named(models, tmp_path):
    folder = shutil.copytree(models("llama"), tmp_path / "in")
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "file.txt").write_text("of another folder")
    (folder / "notes" / "gone").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    (folder / "linked").symlink_to(tmp_path / "beside")
    (folder / "file.txt").symlink_to(tmp_path / "beside" / "file.txt")
    os.mkfifo(folder / "pipe")
    (folder / "to pipe").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        place = os.open(folder, os.O_RDONLY)  # a socket's path has to be short
        server.bind(f"/proc/self/fd/{place}/door")
        os.close(place)
        kinds = {"door": "a socket", "linked": "a link to a folder", "loop": "a link to nothing",
                 "notes/gone": "a link to nothing", "pipe": "a pipe", "to pipe": "a pipe"}  # fmt: skip
        planned = reattend.apply("int8", folder, tmp_path / "out")
    named = [remark for remark in planned.summary()["remarks"] if remark.startswith("not copied: ")]
    assert named == [f"not copied: {name} ({kind})" for name, kind in kinds.items()]
    assert (tmp_path / "out/file.txt").read_text() == "of another folder"
    assert not [name for name in kinds if os.path.lexists(tmp_path / "out" / name)]


def test_a_folder_that_cannot_be_read_is_named(models, tmp_path, monkeypatch):
    folder = shutil.copytree(models("llama"), tmp_path / "in")
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder / "notes")
    assert "not copied: notes (a folder that can't be read)" in reattend.plan("int8", folder).remarks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
def test_source_dtypes(tmp_path, dtype):
    folder = write_model("llama", tmp_path / "in")
    weights = {k: v.to(dtype).clone() for k, v in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    reattend.apply("int8", folder, tmp_path / "out")
    out = load_file(tmp_path / "out/model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    error = (out[name].double() * out[name + "_scale"].double() - weights[name].double()).norm() / weights[
        name
    ].double().norm()
    assert error < 0.01


def test_killed_at_any_moment_resumes_to_the_same_bytes(models, sound, tmp_path):
    rng = random.Random(0)
    for _ in range(20):
        out = tmp_path / "out"
        started, end = CONTEXT.Pipe(duplex=False)
        child = CONTEXT.Process(target=apply_slowly, args=(models("llama"), out, end))
        child.start()
        started.recv()
        time.sleep(rng.uniform(0, 0.5))
        child.kill()
        child.join()
        reattend.apply("int8", models("llama"), out, resume=True, overwrite=True)
        assert digest(out) == digest(sound)
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
        shutil.rmtree(out)


def interrupt(monkeypatch, model, out):
    calls = []

    def stop(*args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reattend.apply("int8", model, out, progress=stop)


@pytest.mark.parametrize("damage", ["lost", "short", "group that is none", "finished", "shape", "depth"])
def test_resume_refuses_what_its_journal_does_not_fit(models, tmp_path, monkeypatch, damage):
    monkeypatch.setattr(staging, "_SYNC_BYTES", 1)  # groups are noted at once
    interrupt(monkeypatch, models("llama"), tmp_path / "out")
    folder = tmp_path / ".out.partial"
    journal = folder / staging.JOURNAL
    assert journal.read_text().count("\n[") >= 2
    (shard,) = (folder / "out").glob("*.safetensors")
    if damage == "lost":
        shard.unlink()
    elif damage == "short":
        os.truncate(shard, 5000)
    else:
        more = {
            "group that is none": "[9999]",
            "finished": '"finished"',
            "shape": '["a", null]',
            "depth": "[" * 100_000,
        }
        journal.write_text(journal.read_text() + more[damage] + "\n")
    with pytest.raises(Refusal, match="--overwrite"):
        reattend.apply("int8", models("llama"), tmp_path / "out", resume=True)
    assert not (tmp_path / "out").exists()
    assert folder.exists()


def test_resume_refuses_another_recipe_and_changed_weights(models, tmp_path, monkeypatch):
    folder = shutil.copytree(models("llama"), tmp_path / "in")
    interrupt(monkeypatch, folder, tmp_path / "out")
    with pytest.raises(Refusal, match="--resume"):
        reattend.apply("int8", folder, tmp_path / "out")
    with pytest.raises(Refusal, match="another recipe"):
        reattend.apply("int8-bitsandbytes", folder, tmp_path / "out", resume=True)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    with pytest.raises(Refusal, match="another recipe"):
        reattend.apply("int8", folder, tmp_path / "out", resume=True)
    assert not (tmp_path / "out").exists()


def test_a_finished_output_is_replaced_only_when_told(models, tmp_path):
    reattend.apply("int8", models("llama"), tmp_path / "out")
    before = digest(tmp_path / "out")
    with pytest.raises(Refusal, match="--overwrite"):
        reattend.apply("int8-bitsandbytes", models("llama"), tmp_path / "out")
    assert digest(tmp_path / "out") == before
    reattend.apply("int8-bitsandbytes", models("llama"), tmp_path / "out", overwrite=True)
    assert digest(tmp_path / "out") != before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_two_runs_into_one_output(models, tmp_path):
    def second(phase, done, total):
        with pytest.raises(Refusal, match="another run"):
            reattend.apply("int8", models("llama"), tmp_path / "out", resume=True)

    reattend.apply("int8", models("llama"), tmp_path / "out", progress=second)
    assert (tmp_path / "out/config.json").exists()


def test_a_full_disk_is_known_before_the_start(models, tmp_path, monkeypatch):
    monkeypatch.setattr(execution.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(Refusal, match="needs"):
        reattend.apply("int8", models("llama"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_no_output_and_resumes(models, sound, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, limits[1]))
    try:
        with pytest.raises(Failure, match="--resume"):
            reattend.apply("int8", models("llama"), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "out").exists()
    reattend.apply("int8", models("llama"), tmp_path / "out", resume=True)
    assert digest(tmp_path / "out") == digest(sound)


def test_what_could_not_be_synced_is_not_counted_as_done(models, sound, tmp_path, monkeypatch):
    syncs = []

    def sync(descriptor):
        syncs.append(descriptor)
        if len(syncs) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")  # as it comes where blocks are allocated late

    with monkeypatch.context() as patched:
        patched.setattr(staging, "_SYNC_BYTES", 1)
        patched.setattr(os, "fdatasync", sync)
        with pytest.raises(Failure, match=r"No space left on device.*--resume"):
            reattend.apply("int8", models("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    _, *noted = (tmp_path / ".out.partial" / staging.JOURNAL).read_text().splitlines()
    assert noted == ["[0]", "[1]"]
    reattend.apply("int8", models("llama"), tmp_path / "out", resume=True)
    assert digest(tmp_path / "out") == digest(sound)


def test_verify_finds_what_is_wrong(models, tmp_path):
    reattend.apply("int8", models("llama"), tmp_path / "out")
    path = tmp_path / "out/model.safetensors"
    content = {k: v.clone() for k, v in load_file(path).items()}
    norm = content.pop("model.layers.1.input_layernorm.weight")
    save_file(content, path, {"format": "pt"})
    assert any("missing" in problem for problem in reattend.verify(tmp_path / "out")["problems"])
    save_file(content | {"model.layers.1.input_layernorm.weight": norm * 3}, path, {"format": "pt"})
    problems = reattend.verify(tmp_path / "out", against=models("llama"))["problems"]
    assert any("logits differ" in problem for problem in problems)
    with pytest.raises(Refusal, match="not the source"):
        reattend.verify(tmp_path / "out", against=models("qwen2"))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"tolerance": "0.1", "source": "x"}', '{"tolerance": 0.1}'])
def test_a_damaged_manifest_is_refused(models, tmp_path, content):
    reattend.apply("int8", models("llama"), tmp_path / "out")
    (tmp_path / "out/reattend.json").write_text(content)
    with pytest.raises(Refusal, match=r"reattend\.json"):
        reattend.verify(tmp_path / "out")


def test_foreign_errors_become_one_line():
    assert first_line(ValueError("\n a\nb")) == "a"
    assert first_line(ValueError()) == "ValueError"
