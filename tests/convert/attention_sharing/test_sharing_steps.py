"""The steps attention_sharing and attention_drop, from end to end."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import reattend
from pairs import tiny
from reattend import demo
from reattend.errors import DeadEndError, Refusal
from reattend.pipeline.inspection import inspect
from reattend.recipes.schema import parse_recipe
from tiny_models import GQA

SETTINGS = {
    "window": 32, "windows": 4, "selection_windows": 3,
    "calibration": str(demo.SELECT_TEXT), "selection": str(demo.EVAL_TEXT),
}  # fmt: skip
IDS = torch.randint(3, 2000, (2, 20), generator=torch.Generator().manual_seed(0))


def recipe(step, **changes):
    return parse_recipe({"steps": [step]} | SETTINGS | changes, "test")


def apply(step, source, out, **changes):
    reattend.apply(recipe(step, **changes), source, out)
    return json.loads((out / "reattend.json").read_text())["findings"][-1]


def logits(folder):
    model = reattend.load(folder, dtype="float64", runtime="stock").model
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("sharing") / "model", num_hidden_layers=5)


@pytest.fixture(scope="module")
def alike(tmp_path_factory):
    """Layer 1 adds nothing, so layer 2 reads what layer 1 read; its q and k are layer 1's, heads in another order."""
    folder = tiny(
        tmp_path_factory.mktemp("alike") / "model",
        num_hidden_layers=4, hidden_size=64, num_attention_heads=8, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    tensors = {name: value.double() for name, value in load_file(folder / "model.safetensors").items()}
    one, two = "model.layers.1.", "model.layers.2."
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"{one}{name}.weight"].zero_()
    tensors[f"{two}input_layernorm.weight"] = tensors[f"{one}input_layernorm.weight"].clone()
    order = torch.tensor([6, 5, 7, 4, 1, 3, 0, 2])
    queries = tensors[f"{one}self_attn.q_proj.weight"].view(8, 8, 64)
    keys = tensors[f"{one}self_attn.k_proj.weight"].view(2, 8, 64)
    tensors[f"{two}self_attn.q_proj.weight"] = queries[order].reshape(64, 64).clone()
    tensors[f"{two}self_attn.k_proj.weight"] = keys.flip(0).reshape(16, 64).clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_follower_with_equal_weights_and_input_changes_nothing(alike, tmp_path):
    apply({"step": "attention_sharing", "pairs": {2: 1}, "refit": False}, alike, tmp_path / "out")
    want, got = logits(alike), logits(tmp_path / "out")
    assert float((got - want).norm() / want.norm()) < 1e-6  # calibration keeps followers in fp32
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert "model.layers.2.self_attn.q_proj.weight" not in tensors
    assert "model.layers.2.self_attn.k_proj.weight" not in tensors


@pytest.mark.parametrize(
    "step",
    [
        {"step": "attention_sharing", "pairs": {1: 0, 3: 2, 4: 2}, "refit": False},
        {"step": "attention_drop", "layers": [2, 4]},
    ],
    ids=["shared", "dropped"],
)
def test_what_is_measured_while_choosing_is_what_is_written(model, tmp_path, step):
    """The loss of a trial, in one pass over the source, is that of the output."""
    from reattend.convert.attention_sharing.trials import Trial, Trials
    from reattend.pipeline.calibrating import prepare
    from reattend.pipeline.planning import plan
    from reattend.progress import silent

    planned = plan(recipe(step | {"followers": 1, "pairs": None} if "pairs" in step else step), model)
    apply(step, model, tmp_path / "out")
    asked = recipe({"step": "attention_sharing", "followers": 1})
    calibration = prepare(plan(asked, model), "cpu", silent)
    stage, statistics = calibration.plan.stages[0], {}
    passes = calibration.passes(stage, model, tmp_path)
    maps = mapped(stage, passes, statistics)
    trial = Trial(step.get("pairs", {}), frozenset(step.get("layers", ())))
    (loss,) = Trials(passes, statistics, maps, planned.source.num_kv_heads).losses([trial])
    tokens = passes.setting.tokens["selection"]
    output = reattend.load(tmp_path / "out", dtype="float32", runtime="stock").model
    with torch.no_grad():
        want = torch.stack([output(one[None], labels=one[None]).loss for one in tokens]).mean()
    assert loss == pytest.approx(float(want), rel=2e-3)  # the output is bf16


def mapped(stage, passes, statistics):
    from reattend.convert.attention_sharing.similarity import Similarities

    similarities = Similarities({layer: list(range(layer)) for layer in range(5)})
    for layer in passes("calibration", windows=4):
        similarities.take(layer)
        statistics[f"similarity-{layer.index}"] = similarities.measure(layer.index)
    return lambda layer, leader: stage.transform._map(stage.source, statistics, layer, leader)


def test_fitting_helps(model, tmp_path):
    step = {"step": "attention_sharing", "pairs": {2: 1, 4: 3}, "refit_steps": 6}
    errors = apply(step, model, tmp_path / "out", windows=16)["output_error"]
    for layer in ("2", "4"):
        assert min(errors[layer].values()) < errors[layer]["folded"], layer
    for folder in (tmp_path / "out",):
        assert reattend.verify(folder, against=model)["problems"] == []


def test_a_layer_whose_attention_does_nothing_is_dropped_first(tmp_path):
    folder = tmp_path / "model"  # a trained one, which the attention of other layers helps
    shutil.copytree(demo.MODEL, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.self_attn.o_proj.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = apply({"step": "attention_drop", "count": 1}, folder, tmp_path / "out")
    assert found["layers"] == [3]
    assert found["selection_rise"] == 0.0
    assert torch.equal(logits(folder), logits(tmp_path / "out"))


def test_budgets(model, tmp_path):
    found = apply({"step": "attention_sharing", "budget": 1e6, "refit": False}, model, tmp_path / "all")
    # Each follower needs one before it that attends by itself.
    assert all(str(leader) not in found["pairs"] for leader in found["pairs"].values())
    assert len(found["selection_perplexity"]) == len(found["pairs"]) + 1
    with pytest.raises(DeadEndError, match="budget 1e-09: no more than 0 layers can be chosen"):
        apply({"step": "attention_drop", "budget": 1e-9}, demo.MODEL, tmp_path / "none", window=256)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"step": "attention_sharing", "pairs": {0: 1}}, "pairs: layer 0 can't follow 1"),
        ({"step": "attention_sharing", "pairs": {2: 1, 1: 0}}, "pairs: layer 2 can't follow 1"),
        ({"step": "attention_sharing", "pairs": {9: 1}}, "pairs: layer 9 is none of 5"),
        ({"step": "attention_sharing", "pairs": {1: -1}}, "pairs: layer 1 can't follow -1"),
        ({"step": "attention_sharing", "followers": 1, "budget": 0.1}, "expected one of followers, budget and pairs"),
        ({"step": "attention_sharing", "pairs": {}}, "pairs: is empty"),
        ({"step": "attention_sharing", "followers": 5}, "followers: 5, the model has 5 layers"),
        ({"step": "attention_drop", "layers": [0]}, "layers: layers \\[0\\], the first of their types"),
        ({"step": "attention_drop", "layers": [2, 2]}, "layers: expected different layers"),
        ({"step": "attention_drop", "layers": [1], "count": 1}, "expected one of count, budget and layers"),
    ],
)
def test_refused(model, tmp_path, step, message):
    with pytest.raises(Refusal, match=message):
        reattend.plan(recipe(step), model)


def test_sources_that_are_refused(model, tmp_path):
    shared, gated = tmp_path / "shared", tmp_path / "gated"
    apply({"step": "attention_sharing", "pairs": {2: 1}, "refit": False}, model, shared)
    apply({"step": "gates", "kind": "linear"}, model, gated)
    for source, what in ((shared, "attention that is shared already"), (gated, "gated attention")):
        with pytest.raises(Refusal, match=what):
            reattend.plan(recipe({"step": "attention_drop", "layers": [3]}), source)
    for settings in (
        {"step": "mla", "target": "portable", "latent_rank": 16, "rope_dim": 8},
        {"step": "int8", "outliers": "smooth"},
    ):
        with pytest.raises(Refusal, match="the source's layers share attention or have none"):
            reattend.plan(recipe(settings), shared)
    with pytest.raises(Refusal, match="outliers: the model's layers share attention or have none"):
        reattend.evaluate(shared, demo.EVAL_TEXT, window=32, windows=1, outliers=True)
    apply({"step": "attention_drop", "layers": [3]}, model, tmp_path / "dropped")
    with pytest.raises(Refusal, match="gates: layers of the source have no attention"):
        reattend.plan(recipe({"step": "gates"}), tmp_path / "dropped")


def test_inspect_says_which_steps_apply(model, tmp_path):
    apply({"step": "attention_sharing", "pairs": {2: 1}, "refit": False}, model, tmp_path / "shared")
    steps = inspect(model)["steps"]
    assert {steps[name] for name in ("attention_sharing", "attention_drop", "dictionary")} == {"yes"}
    steps = inspect(tmp_path / "shared")["steps"]
    assert {steps[name] for name in ("int8", "heal", "int8_attention")} == {"yes"}
    for name in ("mla", "dictionary", "attention_drop"):
        assert steps[name].startswith("no: "), name


def test_the_plan_tells_the_cache_that_is_used(model, tmp_path):
    steps = {"shared": {"step": "attention_sharing", "pairs": {2: 1, 4: 3}, "refit": False},
             "dropped": {"step": "attention_drop", "layers": [1, 3]}}  # fmt: skip
    for name, step in steps.items():
        apply(step, model, tmp_path / name)
        said = reattend.plan(recipe(step), model).summary()["cache_bytes_per_token_after"]
        loaded = reattend.load(tmp_path / name, runtime="stock").model
        cache = transformers.DynamicCache(config=loaded.config)
        with torch.no_grad():
            loaded(IDS, cache=cache)
        held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
        assert held == said * IDS.numel(), name


def test_int8_and_healing_follow(model, tmp_path):
    shared = tmp_path / "shared"
    apply({"step": "attention_sharing", "pairs": {2: 1}, "refit": False}, model, shared)
    reattend.apply("int8", shared, tmp_path / "int8")
    assert reattend.verify(tmp_path / "int8", against=shared)["problems"] == []
    settings = {"steps": 4, "batch": 2, "micro_batch": 1, "evaluate_every": 2, "window": 32, "selection_windows": 2,
                "learning_rate": 1e-2, "recompute": True}  # fmt: skip
    reattend.heal(
        shared, tmp_path / "healed", teacher=model, text=demo.SELECT_TEXT, selection=demo.EVAL_TEXT, settings=settings
    )
    assert reattend.verify(tmp_path / "healed", against=shared)["problems"] == []


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_families(tmp_path, family):
    """Written without a fit and read by transformers alone, a follower computes what the model's own layer would."""
    from tiny_models import CONFIGS

    name, settings = CONFIGS[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings | {"vocab_size": 2048, "num_hidden_layers": 4})
    source = getattr(transformers, f"{name}ForCausalLM")(config).double()
    for parameter in source.parameters():
        nn.init.normal_(parameter, 0.5 if parameter.ndim == 1 else 0.0, 0.3)
    layers = source.model.layers
    for name, parameter in layers[2].named_parameters():
        if name.startswith(("self_attn", "input_layernorm")):
            parameter.data.copy_(layers[1].get_parameter(name))
    for linear in (layers[1].self_attn.o_proj, layers[1].mlp.down_proj):
        linear.weight.data.zero_()
    source.save_pretrained(tmp_path / "source")
    tiny(tmp_path / "tokenizer")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "source" / file).write_bytes((tmp_path / "tokenizer" / file).read_bytes())
    apply({"step": "attention_sharing", "pairs": {2: 1}, "refit": False}, tmp_path / "source", tmp_path / "out")
    want, got = logits(tmp_path / "source"), logits(tmp_path / "out")
    assert float((got - want).norm() / want.norm()) < 1e-6
    assert GQA["num_key_value_heads"] == 2
