"""A recipe of two steps writes what two runs of one step each write: what the first learned reaches the second."""

import json

import pytest
from safetensors.torch import load_file

import reattend
from reattend import demo
from reattend.convert.mla.transform import Mla
from reattend.families.attention_kinds import KEY
from reattend.quantize.attention.transform import Int8Attention
from reattend.quantize.int8.transform import Int8
from reattend.recipes.schema import Recipe

MLA = Mla(latent_rank=48, rope_dim=8, refit=False)
PAIRS = {
    "mla, int8": (MLA, Int8(activations="none")),
    "mla, int8_attention": (MLA, Int8Attention()),
    "int8_attention, int8": (Int8Attention(), Int8()),
    "int8 static, int8_attention": (Int8(outliers="static"), Int8Attention(values="fp16")),
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


def test_another_attention_loses_the_choice_and_says_so(tmp_path):
    first = run((Int8Attention(),), demo.MODEL, tmp_path / "first")
    planned = reattend.plan(Recipe(steps=(MLA,), window=64), first)
    assert any(KEY in remark for remark in planned.remarks)
    assert KEY not in json.loads((run((MLA,), first, tmp_path / "out") / "config.json").read_text())
