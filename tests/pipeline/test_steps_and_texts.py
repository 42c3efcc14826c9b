"""Recipes of several steps, and steps that calibrate: with transforms that only these tests know."""

import json
import shutil
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import load_file

import reattend
from reattend import demo
from reattend.calibration.moments import Point, layer_moments
from reattend.errors import Failure, Refusal
from reattend.modeling import loading
from reattend.modeling.loading import load
from reattend.pipeline import calibrating, execution
from reattend.quantize.int8.transform import Int8
from reattend.recipes.schema import Recipe
from reattend.texts.reading import read_text
from reattend.transform import Group

TEXT = demo.EVAL_TEXT.with_name("select.txt")


class Rescale(BaseModel, frozen=True):
    """Lossless: v_proj times a factor, o_proj divided by it."""

    step: Literal["rescale"] = "rescale"
    factor: float = 2.0
    texts: tuple[str, ...] = ()
    tolerance: float = 0.0

    def check(self, source: Any) -> list[str]:
        return []

    def calibrate(self, source: Any, passes: Any, statistics: Any) -> None:
        pass

    def statistics_bytes(self, source: Any) -> int:
        return 0

    @property
    def undecided(self) -> bool:
        return False

    def settled(self, findings: Any) -> Any:
        return self

    def side_files(self, source: Any, statistics: Any) -> Iterator[tuple[str, bytes]]:
        yield f"beside/{self.step}.txt", str(self.factor).encode()

    def groups(self, source: Any) -> Iterator[Group]:
        for i in range(source.num_layers):
            names = tuple(f"{source.prefix}layers.{i}.self_attn.{n}_proj.weight" for n in "vo")
            yield Group(names, tuple(source.tensors[name] for name in names))

    def apply(self, group: Group, tensors: Any, statistics: Any, source: Any) -> dict[str, torch.Tensor]:
        v, o = group.reads
        return {v: tensors[v] * self.factor, o: tensors[o] / self.factor}

    def edit_config(self, source: Any, statistics: Any) -> dict[str, Any]:
        return {**source.config, "rescaled": source.config.get("rescaled", 0) + 1}

    def findings(self, statistics: Any) -> dict[str, Any]:
        return {"seen": sorted(statistics)}

    def engines(self, source: Any) -> dict[str, str]:
        return {}


class Whiten(Rescale, frozen=True):
    """Divides v_proj by the largest input that calibration saw, and o_proj takes it back."""

    step: Literal["whiten"] = "whiten"
    texts: tuple[str, ...] = ("calibration",)

    def calibrate(self, source: Any, passes: Any, statistics: Any) -> None:
        for layer in passes():
            (found,) = layer_moments(layer, [Point("self_attn.v_proj")]).values()
            statistics[str(layer.index)] = {"absmax": found["absmax"].max()[None]}

    def apply(self, group: Group, tensors: Any, statistics: Any, source: Any) -> dict[str, torch.Tensor]:
        v, o = group.reads
        factor = float(statistics[v.split(".")[2]]["absmax"])
        return {v: tensors[v] / factor, o: tensors[o] * factor}


def recipe(*steps: BaseModel, **settings: Any) -> Recipe:
    return Recipe(steps=steps, **{"windows": 4, "window": 64, "calibration": str(TEXT), **settings})


def logits(folder):
    with torch.inference_mode():
        return load(folder, dtype="float32").model(torch.arange(40)[None]).logits


def test_steps_run_in_order_on_what_the_one_before_wrote(tmp_path):
    planned = reattend.apply(recipe(Rescale(factor=4.0), Rescale(factor=0.5), Int8()), demo.MODEL, tmp_path / "all")
    reattend.apply(recipe(Rescale(factor=2.0)), demo.MODEL, tmp_path / "one")
    reattend.apply("int8", tmp_path / "one", tmp_path / "two")
    together, apart = (load_file(tmp_path / n / "model.safetensors") for n in ("all", "two"))
    assert together.keys() == apart.keys()
    assert all(torch.equal(together[name], apart[name]) for name in together)
    assert json.loads((tmp_path / "all/config.json").read_text())["rescaled"] == 2
    assert planned.tolerance == pytest.approx(Int8().tolerance)
    assert execution.read_findings(tmp_path / "all") == [{"seen": []}, {"seen": []}, {}]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all", "one", "two"]
    assert not (tmp_path / "all/work").exists()
    assert (tmp_path / "all/beside/rescale.txt").read_text() == "0.5"  # the last of the steps that wrote it
    assert reattend.verify(tmp_path / "all", against=demo.MODEL)["problems"] == []


def test_a_later_step_is_checked_before_anything_is_written(tmp_path):
    with pytest.raises(Refusal, match="quantised already"):
        reattend.apply(recipe(Int8(), Int8()), demo.MODEL, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_calibration_sees_the_model_of_its_step(tmp_path):
    reattend.apply(recipe(Rescale(), Whiten()), demo.MODEL, tmp_path / "out")
    inputs = []
    model, tokenizer = load(demo.MODEL, dtype="float32")
    from reattend.calibration.tokens import sample_tokens

    handle = model.model.layers[2].self_attn.v_proj.register_forward_hook(lambda m, a, o: inputs.append(a[0]))
    ids = sample_tokens(read_text(TEXT), tokenizer, windows=4, window=64, seed=0)
    with torch.inference_mode():
        model(ids)
    handle.remove()
    source, out = (load_file(f / "model.safetensors") for f in (demo.MODEL, tmp_path / "out"))
    name = "model.layers.2.self_attn.v_proj.weight"
    expected = 2 * source[name].float() / inputs[0].abs().max()
    torch.testing.assert_close(out[name].float(), expected, rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(logits(tmp_path / "out"), logits(demo.MODEL), rtol=0, atol=0.1)


class Stopped(Exception):
    pass


def test_an_interrupted_run_keeps_its_statistics(tmp_path, monkeypatch):
    reattend.apply(recipe(Rescale(), Whiten()), demo.MODEL, tmp_path / "undisturbed")
    phases = []

    def stop(phase, done, total):
        phases.append(phase)
        if phase == "rewriting" and "calibrating" in phases:
            raise Stopped

    with pytest.raises(Stopped):
        reattend.apply(recipe(Rescale(), Whiten()), demo.MODEL, tmp_path / "out", progress=stop)
    monkeypatch.setattr(calibrating, "layer_passes", None)  # a second calibration would fail
    reattend.apply(recipe(Rescale(), Whiten()), demo.MODEL, tmp_path / "out", resume=True)
    for file in ("model.safetensors", "config.json", "reattend.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "undisturbed" / file).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "undisturbed"]


def test_of_three_steps_none_is_done_twice(tmp_path, monkeypatch):
    steps = (Whiten(), Whiten(), Whiten())  # each calibrates, so each is a pass of its own
    reattend.apply(recipe(*steps), demo.MODEL, tmp_path / "undisturbed")

    whole = []

    def stop(phase, done, total):
        if phase == "rewriting" and len(whole) == 2:
            raise Stopped
        if phase == "rewriting" and done == total:
            whole.append(done)

    with pytest.raises(Stopped):
        reattend.apply(recipe(*steps), demo.MODEL, tmp_path / "out", progress=stop)
    assert (tmp_path / ".out.partial/work/model-2").exists()
    monkeypatch.setattr(calibrating, "layer_passes", None)
    phases = []
    reattend.apply(recipe(*steps), demo.MODEL, tmp_path / "out", resume=True, progress=lambda *a: phases.append(a))
    assert sum(done == total for phase, done, total in phases) == 1  # the third step alone was rewritten
    for file in ("model.safetensors", "config.json", "reattend.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "undisturbed" / file).read_bytes()


def test_a_failure_keeps_what_was_done_and_nothing_else(tmp_path, monkeypatch):
    class Broken(Whiten, frozen=True):
        def calibrate(self, source: Any, passes: Any, statistics: Any) -> None:
            raise Failure("broken")

    with pytest.raises(Failure):
        reattend.apply(recipe(Broken()), demo.MODEL, tmp_path / "nothing")
    assert not list(tmp_path.iterdir())
    with pytest.raises(Failure):
        reattend.apply(recipe(Rescale(), Broken()), demo.MODEL, tmp_path / "out")
    assert (tmp_path / ".out.partial/work/model-1/config.json").exists()
    monkeypatch.setattr(execution.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(Refusal, match="needs"):
        reattend.apply(recipe(Rescale(), Broken()), demo.MODEL, tmp_path / "out", resume=True)
    assert (tmp_path / ".out.partial/work/model-1/config.json").exists()


def test_texts_of_an_earlier_run_are_remembered(tmp_path):
    reattend.apply(recipe(Whiten()), demo.MODEL, tmp_path / "one")
    reattend.apply(recipe(Rescale(), calibration=None), tmp_path / "one", tmp_path / "two")
    with pytest.raises(Refusal, match="earlier calibration text"):
        reattend.evaluate(tmp_path / "two", TEXT, window=64, windows=1)


def test_a_text_that_no_step_uses_is_remarked_on():
    assert any(
        "calibration text is not used" in remark for remark in reattend.plan(recipe(Int8()), demo.MODEL).remarks
    )


def test_a_run_with_another_text_is_not_resumed(tmp_path):
    def stop(phase, done, total):
        raise Stopped

    with pytest.raises(Stopped):
        reattend.apply(recipe(Whiten()), demo.MODEL, tmp_path / "out", progress=stop)
    other = recipe(Whiten(), calibration=str(demo.EVAL_TEXT))
    with pytest.raises(Refusal, match="another recipe"):
        reattend.apply(other, demo.MODEL, tmp_path / "out", resume=True)


def test_texts_are_asked_for_and_held_apart(tmp_path, models):
    both = Whiten(texts=("calibration", "selection"))
    shared = tmp_path / "shared.txt"
    shared.write_text("A heading\n" + TEXT.read_text("utf-8")[:4000], "utf-8")
    cases = (
        (recipe(Whiten(), calibration=None), "--calibration"),
        (recipe(both), "--selection"),
        (recipe(both, selection=str(TEXT)), "calibration text"),
        (recipe(both, selection=str(shared)), "calibration text"),
        (recipe(Whiten(), calibration=str(tmp_path / "absent.txt")), "absent.txt"),
        (recipe(Whiten(), windows=10**6), "1000000 are asked for"),
        (recipe(Whiten(), window=513), "window: 513"),
        (recipe(Whiten(), calibration="dataset:"), "dataset:PATH"),
        (recipe(Whiten(), calibration="dataset:x?splt=train"), "dataset:PATH"),
    )
    for bad, message in cases:
        with pytest.raises(Refusal, match=message):
            reattend.apply(bad, demo.MODEL, tmp_path / "out")
    with pytest.raises(Refusal, match="tokenizer"):
        reattend.apply(recipe(Whiten()), models("llama"), tmp_path / "out")
    with pytest.raises(Refusal, match="no-such-device"):
        reattend.apply(recipe(Whiten()), demo.MODEL, tmp_path / "out", device="no-such-device")
    assert [p.name for p in tmp_path.iterdir()] == ["shared.txt"]


def test_a_model_is_not_measured_on_its_calibration_text(tmp_path):
    reattend.apply(recipe(Whiten()), demo.MODEL, tmp_path / "out")
    with pytest.raises(Refusal, match="calibration text"):
        reattend.evaluate(tmp_path / "out", TEXT, window=64, windows=1)
    report = reattend.evaluate(tmp_path / "out", demo.EVAL_TEXT, window=64, windows=1)
    assert report["tokens"] == 63


def test_a_dataset_calibrates_as_the_text_of_its_rows(tmp_path):
    paragraphs = TEXT.read_text("utf-8").split("\n\n")
    (tmp_path / "rows").mkdir()
    rows = "".join(json.dumps({"passage": paragraph}) + "\n" for paragraph in paragraphs)
    (tmp_path / "rows/train.jsonl").write_text(rows, "utf-8")
    source = f"dataset:{tmp_path}/rows?column=passage"
    assert read_text(source).content == "\n\n".join(paragraphs)
    for bad in ("rows?column=absent", "rows?column=passage&split=tset", "absent"):
        with pytest.raises(Refusal, match="dataset:"):
            read_text(f"dataset:{tmp_path}/{bad}")


def test_offloaded_weights_give_the_same_logits():
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        whole = load(demo.MODEL, dtype="float32").model(ids).logits
        offloaded = load(demo.MODEL, dtype="float32", offload=True).model
        assert all(p.device.type == "meta" for p in offloaded.parameters())
        assert torch.equal(offloaded(ids).logits, whole)


def test_a_model_larger_than_memory_is_evaluated_and_one_that_cannot_be_is_refused(tmp_path, monkeypatch):
    options = {"window": 64, "windows": 2, "dtype": "float32"}
    whole = reattend.evaluate(demo.MODEL, demo.EVAL_TEXT, **options)
    reattend.apply("int8", demo.MODEL, tmp_path / "int8")
    monkeypatch.setattr(loading, "free_bytes", lambda device: 4_000_000)
    assert reattend.evaluate(demo.MODEL, demo.EVAL_TEXT, **options) == whole
    monkeypatch.setattr(loading, "free_bytes", lambda device: 3_000_000)
    with pytest.raises(Refusal, match="does not fit"):
        reattend.evaluate(tmp_path / "int8", demo.EVAL_TEXT, **options)


def test_verify_leaves_a_model_larger_than_memory_on_the_disk(tmp_path, monkeypatch):
    reattend.apply(recipe(Rescale()), demo.MODEL, tmp_path / "out")
    whole = reattend.verify(tmp_path / "out", against=demo.MODEL)
    # The probe runs in a process of its own: its view of the memory is changed through a psutil of ours.
    (tmp_path / "path").mkdir()
    (tmp_path / "path/psutil.py").write_text(
        "class virtual_memory:\n    available = 4_000_000\n"
        "def __getattr__(name): return lambda *a, **k: virtual_memory()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    assert reattend.verify(tmp_path / "out", against=demo.MODEL) == whole
    reattend.apply("int8", demo.MODEL, tmp_path / "int8")
    with pytest.raises(Failure, match="does not fit"):
        reattend.verify(tmp_path / "int8")
