"""A recipe of two steps writes what two runs of one step each write: what the first learned reaches the second."""

import json

import pytest
from safetensors.torch import load_file

import reattend
from reattend import demo
from reattend.convert.gates.transform import Gates
from reattend.convert.mla.transform import Mla
from reattend.convert.portable.transform import Portable
from reattend.families.attention_kinds import KEY
from reattend.pipeline import execution, streaming
from reattend.quantize.attention.transform import Int8Attention
from reattend.quantize.int8.layout import Int8Layout
from reattend.quantize.int8.transform import Int8
from reattend.recipes.schema import Recipe

MLA = Mla(latent_rank=48, rope_dim=8, refit=False)
PAIRS = {
    "mla, int8": (MLA, Int8(activations="none")),
    "mla, int8_attention": (MLA, Int8Attention()),
    "int8_attention, int8": (Int8Attention(), Int8()),
    "int8 static, int8_attention": (Int8(outliers="static"), Int8Attention(values="fp16")),
    "portable, gates": (Portable(), Gates(kind="linear")),
    "int8, int8_layout": (Int8(), Int8Layout(format="bitsandbytes")),
    "int8_attention, int8_attention": (Int8Attention(), Int8Attention(threshold=1.0, fp8_threshold=1.0)),
}


def run(steps, source, out):
    texts = {"calibration": str(demo.SELECT_TEXT), "selection": str(demo.EVAL_TEXT)}
    reattend.apply(Recipe(steps=steps, windows=2, selection_windows=1, window=64, **texts), source, out)
    return out


@pytest.mark.parametrize("steps", PAIRS.values(), ids=PAIRS)
def test_a_recipe_of_two_steps_is_two_runs(steps, tmp_path):
    together = run(steps, demo.MODEL, tmp_path / "together")
    apart = run(steps[1:], run(steps[:1], demo.MODEL, tmp_path / "first"), tmp_path / "apart")
    configs = [json.loads((folder / "config.json").read_text()) for folder in (together, apart)]
    assert configs[0] == configs[1]
    if any(step.step == "int8_attention" for step in steps):
        assert len(configs[0][KEY]) == 5
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (together, apart))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert reattend.verify(together, against=demo.MODEL)["problems"] == []


def test_steps_without_calibration_join_the_pass_before(tmp_path, monkeypatch):
    """Three steps, one of them calibrated, in one pass over the weights: the bytes of three."""
    steps = (MLA, Int8(), Int8Layout(format="bitsandbytes"))
    assert reattend.plan(Recipe(steps=steps, window=64), demo.MODEL).summary()["passes"] == [
        ["mla", "int8", "int8_layout"]
    ]
    made = []
    monkeypatch.setattr(execution, "stream", lambda *args: made.append(args[0]) or streaming.stream(*args))
    together = run(steps, demo.MODEL, tmp_path / "together")
    assert len(made) == 1
    folder = demo.MODEL
    for number in range(3):
        folder = run(steps[number : number + 1], folder, tmp_path / f"apart-{number}")
    assert (together / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (together / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_a_step_that_calibrates_begins_a_pass():
    steps = (Portable(), Int8Attention(), Gates(kind="linear"), Int8(outliers="smooth"))
    planned = reattend.plan(Recipe(steps=steps, window=64), demo.MODEL)
    assert planned.summary()["passes"] == [["portable"], ["int8_attention", "gates"], ["int8"]]


def test_groups_of_joined_steps(models):
    """Attention is rewritten whole per layer by the first step, each linear alone by the second: one group a layer."""
    planned = reattend.plan(Recipe(steps=(MLA, Int8()), window=64), demo.MODEL)
    (joined,) = planned.passes
    layers = planned.source.num_layers
    alone = sum(1 for group in joined.groups if len(group.reads) == 1)
    assert len(joined.groups) - alone == layers
    assert sorted(name for group in joined.groups for name in group.reads) == sorted(planned.source.tensors)
    written = {spec.name for group in joined.groups for spec in group.writes}
    assert written == set(planned.result.tensors)
    assert all(not group.key for group in joined.groups if "layernorm" in group.reads[0])
    assert planned.peak_bytes > max(stage.group_bytes for stage in planned.stages)


def test_another_attention_loses_the_choice_and_says_so(tmp_path):
    first = run((Int8Attention(),), demo.MODEL, tmp_path / "first")
    planned = reattend.plan(Recipe(steps=(MLA,), window=64), first)
    assert any(KEY in remark for remark in planned.remarks)
    assert KEY not in json.loads((run((MLA,), first, tmp_path / "out") / "config.json").read_text())
