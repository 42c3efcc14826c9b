import itertools
import json
import math

import pytest
import torch

import reattend
from pairs import tiny
from reattend import demo
from reattend.convert.dictionary.grouping import divergences, first_layers
from reattend.errors import Refusal
from reattend.recipes.schema import parse_recipe

SETTINGS = {
    "window": 32, "windows": 4, "selection_windows": 2,
    "calibration": str(demo.SELECT_TEXT), "selection": str(demo.EVAL_TEXT),
}  # fmt: skip


def test_divergences_by_hand():
    logits = torch.tensor([[3.0, 1.0], [1.0, 1.0], [1.0, 1.0]]).log()
    first = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert divergences(logits + 5).tolist() == pytest.approx([first, 0.0], abs=1e-7)


@pytest.mark.parametrize(("layers", "blocks", "longest"), [(7, 3, 4), (8, 2, 4), (6, 1, 6), (5, 5, 3), (9, 4, 3)])
def test_blocks_have_the_least_drift_of_all(layers, blocks, longest):
    """Against all ways to cut."""
    drift = torch.rand(layers - 1).double().tolist()

    def within(first):
        return sum(value for i, value in enumerate(drift) if i + 1 not in first)

    ways = [(0, *cuts) for cuts in itertools.combinations(range(1, layers), blocks - 1)]
    allowed = [w for w in ways if all(b - a <= longest for a, b in itertools.pairwise((*w, layers)))]
    assert within(first_layers(drift, blocks, longest)) == pytest.approx(min(map(within, allowed)))


def recipe(**step):
    return parse_recipe({"steps": [{"step": "dictionary", **step}], **SETTINGS}, "test")


@pytest.mark.parametrize("export", ["dense", "factors"])
def test_blocks_are_cut_where_outputs_change(tmp_path, export):
    """The drift is that of transformers' own hidden states, and the result that of the blocks when they are given."""
    model = tiny(tmp_path / "model", num_hidden_layers=4)
    step = {"solver": "basis", "reduction": 0.3, "export": export}
    reattend.apply(recipe(blocks="kl", **step), model, tmp_path / "out")
    found = json.loads((tmp_path / "out/reattend.json").read_text())["findings"][0]
    assert found["drift"] == pytest.approx(drift_of(model, tmp_path / "out"), rel=1e-3)
    assert found["blocks"] == list(first_layers(found["drift"], 2, 4))
    reattend.apply(recipe(blocks=found["blocks"], **step), model, tmp_path / "given")
    names = [file.name for file in (tmp_path / "given").glob("*.safetensors")]
    assert names
    assert all((tmp_path / "out" / n).read_bytes() == (tmp_path / "given" / n).read_bytes() for n in names)


def drift_of(model, out):
    from reattend.pipeline.calibrating import prepare
    from reattend.progress import silent

    planned = reattend.plan(reattend.recipes.schema.load_recipe(out / "recipe.yaml"), model)
    calibration = prepare(planned, "cpu", silent)
    ids = calibration._tokens(planned.stages[0])["calibration"]
    loaded = reattend.load(model, dtype="float32", runtime="stock").model
    states = []
    hooks = [layer.register_forward_hook(lambda _m, _a, out: states.append(out)) for layer in loaded.model.layers]
    with torch.no_grad():
        for window in ids:
            loaded(window[None])
        for hook in hooks:
            hook.remove()
        means = torch.stack([torch.cat(states[i::4]).mean((0, 1)) for i in range(4)])
        logs = loaded.lm_head(loaded.model.norm(means)).double().log_softmax(-1)
    return [
        float(torch.nn.functional.kl_div(b, a, log_target=True, reduction="sum")) for a, b in itertools.pairwise(logs)
    ]


def test_refused(tmp_path):
    model = tiny(tmp_path / "model", num_hidden_layers=4)
    with pytest.raises(Refusal, match="blocks: kl: goes with no solver svd"):
        reattend.plan(recipe(blocks="kl"), model)
    with pytest.raises(Refusal, match="blocks: kl: goes with no given ranks"):
        reattend.plan(recipe(blocks="kl", solver="basis", export="factors", ranks={"q_proj": {0: 1}}), model)
