"""A recipe of two steps writes what two runs of one step each write: what the first learned reaches the second."""

import json

import pytest
from safetensors.torch import load_file

import reattend
from reattend import demo
from reattend.convert.attention_drop.transform import AttentionDrop
from reattend.convert.attention_sharing.transform import AttentionSharing
from reattend.convert.dictionary.transform import Dictionary
from reattend.convert.gates.transform import Gates
from reattend.convert.mla.transform import Mla
from reattend.convert.portable.transform import Portable
from reattend.errors import Refusal
from reattend.families.attention_kinds import KEY
from reattend.healing.step import Heal
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


# Steps whose calibration decides shapes, and what may follow them.
OPEN = {
    "sharing": AttentionSharing(followers=1, refit_steps=1),
    "drop": AttentionDrop(count=1),
    "dictionary": Dictionary(export="factors", solver="pca"),
    "mla": Mla(latent_rank="auto", cache_budget=0.7, rope_dim=8, target="portable", refit=False),
    "int8": Int8(keep="auto", keep_budget=0.001),
}
HEAL = Heal(steps=1, batch=1)
FOLLOWING = {
    "sharing, heal, int8, int8_attention": ("sharing", HEAL, Int8(), Int8Attention()),
    "sharing, int8": ("sharing", Int8()),
    "drop, heal": ("drop", HEAL),
    "drop, int8_attention": ("drop", Int8Attention()),
    "dictionary, heal, int8": ("dictionary", HEAL, Int8()),
    "dictionary, int8_attention": ("dictionary", Int8Attention()),
    "mla, int8": ("mla", Int8()),
    "int8, int8_layout": ("int8", Int8Layout(format="bitsandbytes")),
}


def run(steps, source, out, **options):
    texts = {"calibration": str(demo.SELECT_TEXT), "selection": str(demo.EVAL_TEXT)}
    reattend.apply(Recipe(steps=steps, windows=2, selection_windows=1, window=64, **texts), source, out, **options)
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


@pytest.mark.parametrize("names", FOLLOWING.values(), ids=FOLLOWING)
def test_steps_after_one_that_calibration_decides_are_runs_of_their_own(names, tmp_path):
    """The plan is made before shapes are known, and made again when they are: the bytes of separate runs."""
    steps = tuple(OPEN.get(step, step) if isinstance(step, str) else step for step in names)
    together = run(steps, demo.MODEL, tmp_path / "together")
    folder = demo.MODEL
    for number, step in enumerate(steps):
        own = step.model_copy(update={"teacher": str(demo.MODEL)}) if step.step == "heal" else step
        folder = run((own,), folder, tmp_path / f"apart-{number}")
    for file in ("model.safetensors", "config.json"):
        assert (together / file).read_bytes() == (folder / file).read_bytes()
    assert reattend.verify(together, against=demo.MODEL)["problems"] == []


@pytest.mark.parametrize("killed", [1, 2])
def test_what_was_decided_is_decided_still_after_an_interruption(killed, tmp_path, monkeypatch):
    steps = (OPEN["sharing"], HEAL, Int8())
    whole = run(steps, demo.MODEL, tmp_path / "whole")
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == killed:
            raise KeyboardInterrupt
        return streaming.stream(*args)

    with monkeypatch.context() as patched:
        patched.setattr(execution, "stream", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(steps, demo.MODEL, tmp_path / "out")
    run(steps, demo.MODEL, tmp_path / "out", resume=True)
    for file in ("model.safetensors", "config.json", "reattend.json"):
        assert (tmp_path / "out" / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.parametrize(
    ("later", "what"),
    [(Gates(kind="linear"), "gates"), (Int8(outliers="smooth"), "int8 with"), (MLA, "mla")],
    ids=str,
)
def test_what_the_plan_can_not_promise_after_an_open_step_is_refused_by_it(later, what):
    for step in (OPEN["sharing"], OPEN["drop"], OPEN["dictionary"]):
        with pytest.raises(Refusal, match=rf"steps\[2\]: {what}.* can't follow steps\[0\].*run of its own"):
            reattend.plan(Recipe(steps=(step, HEAL, later), window=64), demo.MODEL)


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
