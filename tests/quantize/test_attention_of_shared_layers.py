"""int8_attention on models whose layers share attention, have none, or are stored as factors."""

import json

import pytest
import torch

import reattend
from pairs import tiny
from reattend import demo
from reattend.calibration.layerwise import layer_passes
from reattend.checkpoint.index import open_checkpoint
from reattend.families.source import source_of
from reattend.kernels.attention_int8 import attention_int8
from reattend.recipes.schema import parse_recipe

SETTINGS = {
    "window": 32, "windows": 3, "selection_windows": 2,
    "calibration": str(demo.SELECT_TEXT), "selection": str(demo.EVAL_TEXT),
}  # fmt: skip
IDS = torch.randint(3, 2000, (3, 40), generator=torch.Generator().manual_seed(0))
STEPS = {
    "sharing": {"step": "attention_sharing", "pairs": {2: 1, 3: 1, 5: 4}, "refit": False},
    "drop": {"step": "attention_drop", "layers": [2, 4]},
    "dictionary": {"step": "dictionary", "solver": "pca", "export": "factors", "reduction": 0.3},
}


@pytest.fixture(scope="module", params=STEPS)
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    source = tiny(folder / "source", num_hidden_layers=6)
    reattend.apply(parse_recipe({"steps": [STEPS[request.param]], **SETTINGS}, "test"), source, folder / "out")
    return request.param, folder / "out"


def test_layers_one_after_another_are_the_model(made):
    """All windows through each layer: every follower attends with what its leader made of the same window."""
    model = reattend.load(made[1], dtype="float64", runtime="stock").model
    source = source_of(open_checkpoint(made[1]))
    with torch.inference_mode():
        want = model.model(IDS[:2]).last_hidden_state, model.model(IDS[1:]).last_hidden_state
    for layer in layer_passes(model, source.family, {"a": IDS[:2], "b": IDS[1:]}):
        last = layer
    with torch.inference_mode():
        for text, states in zip("ab", want, strict=True):
            torch.testing.assert_close(model.model.norm(last.hidden[text]), states, rtol=1e-12, atol=1e-12)


def test_nothing_is_kept_that_no_later_layer_follows():
    from reattend.calibration.shared_attention import SharedAttention

    shared = SharedAttention([None, None, 1, None, 1, 3])
    held = []
    for layer in range(6):
        with shared.of(layer, ("a", 0), torch.device("cpu")) as left:
            if layer in (1, 3):
                left["shared_attention"][layer] = (torch.full((1,), float(layer)), None)
            held.append(sorted(left["shared_attention"]))
    assert held == [[], [1], [1], [1, 3], [1, 3], [3]]


def test_similarities_are_those_of_the_model_that_runs(made):
    name, out = made
    reattend.apply(
        parse_recipe({"steps": [{"step": "int8_attention"}], **SETTINGS}, "test"), out, out.parent / "int8"
    )
    found = json.loads((out.parent / "int8/reattend.json").read_text())["findings"][-1]
    measured = found["cosine_per_layer"]["int8_fp16"]
    without = STEPS[name].get("layers", [])
    assert [i for i, value in enumerate(measured) if value is None] == without
    assert all(found["kinds"][i] == "exact" for i in without)
    assert all(0.9 < value <= 1 for value in measured if value is not None)


def test_load_quantises_followers_and_decodes_exactly(made, monkeypatch):
    name, out = made
    config = json.loads((out / "config.json").read_text())
    kinds = ["int8_fp16"] * 6
    folder = out.parent / "chosen"
    folder.mkdir()
    for file in out.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"reattend_attention": kinds}))
    lengths = []

    def spy(query, *args, **options):
        lengths.append(query.shape[2])
        return attention_int8(query, *args, **options)

    monkeypatch.setattr("reattend.modeling.attention_backend.attention_int8", spy)
    simulated, exact = (reattend.load(f, dtype="float32", simulate=f == folder).model for f in (folder, out))
    with torch.inference_mode():
        ours, theirs = simulated(IDS).logits, exact(IDS).logits
        attending = 6 - len(STEPS[name].get("layers", []))
        assert lengths == [40] * attending
        assert 1e-5 < float((ours - theirs).norm() / theirs.norm()) < 0.2
        lengths.clear()
        simulated.generate(IDS[:1, :20], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert [n for n in lengths if n > 1] == [20] * attending
    assert name != "sharing" or len(lengths) == attending + 2  # single queries of layer 0: others lead or follow
