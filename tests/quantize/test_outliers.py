import itertools
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load, load_file, save_file

import reattend
from reattend import demo
from reattend.calibration.layerwise import layer_passes
from reattend.checkpoint.index import open_checkpoint
from reattend.errors import Refusal
from reattend.families.source import source_of
from reattend.kernels.int8_linear import Outliers
from reattend.kernels.int8_linear.reference import w8a8
from reattend.quantize.int8.formulas import quantize_channels, token_weights
from reattend.quantize.int8.outliers import allocate, ascending, removal_order
from reattend.quantize.int8.transform import Int8
from reattend.recipes.schema import Recipe

TEXT = demo.EVAL_TEXT.with_name("select.txt")
PLANTED = [3, 40, 77]


def problem():
    x = torch.randn(512, 128, generator=torch.Generator().manual_seed(0))
    x[:, 7] *= 60
    x[:, 90] *= 30
    return x, torch.randn(48, 128, generator=torch.Generator().manual_seed(1))


def test_the_loudest_channel_goes_first():
    x, w = problem()
    columns, errors = removal_order(x, [w], 5)
    assert columns[:2].tolist() == [7, 90]
    assert len(errors) == 6
    assert errors[2] < 0.05 * errors[0]


@pytest.mark.parametrize("huge", [1, 1e3])
def test_curve_is_the_error_of_the_decomposed_product(huge):
    """The closed form with k columns out of the way, against LLM.int8() itself as the kernels' reference computes it."""
    x, w = problem()
    x[:, 7] *= huge
    w[:, 7] /= huge
    columns, errors = removal_order(x, [w], 4)
    assert columns[:2].tolist() == [7, 90]
    codes, scale = quantize_channels(w, torch.float32)
    for k in (0, 1, 2, 4) if huge == 1 else (1, 2, 4):  # what rounds to 0 loses less than the step says
        kept, (weight,) = ascending(columns[:k], [w[:, columns[:k]]])
        y = w8a8(x, codes, scale.flatten(), None, Outliers(kept, weight) if k else None)
        simulated = ((y - x @ w.T).square().sum(1) * token_weights(x @ w.T)).mean()
        assert simulated == pytest.approx(float(errors[k]), rel=0.1)


def test_a_narrow_input_keeps_one_channel():
    columns, errors = removal_order(torch.randn(9, 2), [torch.randn(3, 2)], 64)
    assert (len(columns), len(errors)) == (1, 2)


def test_allocation_is_the_best_for_what_it_spends():
    generator = torch.Generator().manual_seed(0)
    curves = {name: torch.rand(4, generator=generator).cumsum(0).flip(0) for name in "abc"}
    costs = {"a": 2, "b": 3, "c": 5}
    for budget in range(0, 31, 3):
        counts = allocate(curves, costs, budget)
        spent = sum(counts[n] * costs[n] for n in costs)
        error = sum(float(curves[n][counts[n]]) for n in costs)
        assert spent <= budget
        for other in itertools.product(range(4), repeat=3):
            if sum(k * costs[n] for k, n in zip(other, costs, strict=True)) <= spent:
                assert error <= sum(float(curves[n][k]) for k, n in zip(other, costs, strict=True)) + 1e-6
    assert allocate(curves, costs, 30) == {"a": 3, "b": 3, "c": 3}
    assert allocate({}, {}, 5) == {}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The demo model, three input channels of every MLP x20 at the norm and / 20 in the weights: the same function."""
    folder = tmp_path_factory.mktemp("planted") / "in"
    shutil.copytree(demo.MODEL, folder)
    tensors = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    for layer in range(5):
        prefix = f"model.layers.{layer}."
        tensors[f"{prefix}post_attention_layernorm.weight"][PLANTED] *= 20
        for name in ("gate", "up"):
            tensors[f"{prefix}mlp.{name}_proj.weight"][:, PLANTED] /= 20
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def outputs(planted, tmp_path_factory):
    root = tmp_path_factory.mktemp("outputs")
    for mode in ("none", "dynamic", "static"):
        settings = {"calibration": str(TEXT)} if mode == "static" else {}
        recipe = Recipe(steps=(Int8(outliers=mode, select=("*mlp*",)),), windows=4, window=64, **settings)
        reattend.apply(recipe, planted, root / mode)
    return root


def logits(folder, ids):
    model, _ = reattend.load(folder, dtype="float32")
    with torch.inference_mode():
        return model(ids).logits


def test_decomposition_takes_planted_outliers_away(planted, outputs):
    """LLM.int8() against plain W8A8, as `load` runs them."""
    ids = torch.randint(10, 2000, (2, 48), generator=torch.Generator().manual_seed(0))
    exact = logits(planted, ids)
    none, dynamic, static = (
        float((logits(outputs / mode, ids) - exact).norm() / exact.norm()) for mode in ("none", "dynamic", "static")
    )
    assert dynamic < 0.4 * none
    assert static < 0.4 * none


def test_static_columns_hold_the_planted_ones_and_the_weights(planted, outputs):
    source = load_file(planted / "model.safetensors")
    for layer in range(5):
        found = load_file(outputs / "static" / "int8_outliers" / f"layer-{layer:05d}.safetensors")
        for name in ("gate", "up"):
            module = f"model.layers.{layer}.mlp.{name}_proj"
            columns = found[f"{module}.outlier_columns"]
            assert set(PLANTED) <= set(columns.tolist())
            assert columns.tolist() == sorted(set(columns.tolist()))
            assert torch.equal(found[f"{module}.outlier_weight"], source[f"{module}.weight"][:, columns])


def test_columns_stay_within_their_share(outputs):
    numbers = sum(
        value.numel()
        for file in (outputs / "static" / "int8_outliers").iterdir()
        for name, value in load_file(file).items()
        if name.endswith("outlier_weight")
    )
    whole = load_file(outputs / "static" / "model.safetensors")
    quantised = sum(value.numel() for value in whole.values() if value.dtype == torch.int8)
    assert 0.03 * quantised < numbers <= 0.05 * quantised
    counts = json.loads((outputs / "static" / "reattend.json").read_text())["findings"][0]["static_columns"]
    assert len(counts["mlp.gate_proj"]) == 5
    assert min(counts["mlp.gate_proj"]) >= 3


def test_static_outliers_do_not_depend_on_the_batch(outputs):
    ids = torch.randint(10, 2000, (3, 32), generator=torch.Generator().manual_seed(1))
    together, alone = logits(outputs / "static", ids)[:1], logits(outputs / "static", ids[:1])
    assert torch.allclose(together, alone, atol=1e-4)


def test_a_stock_loader_computes_plain_w8a8(planted, outputs):
    """The codes are complete: without the side files the checkpoint is that of `outliers: none`, bit for bit."""
    none, static = (load_file(outputs / mode / "model.safetensors") for mode in ("none", "static"))
    assert none.keys() == static.keys()
    assert all(torch.equal(none[name], static[name]) for name in none)
    assert reattend.verify(outputs / "static", against=planted)["problems"] == []


def test_what_configs_declare(outputs, tmp_path):
    def config(folder):
        return json.loads((folder / "config.json").read_text())

    assert "int8_outliers" not in config(outputs / "none")
    assert config(outputs / "dynamic")["int8_outliers"] == {"mode": "dynamic", "threshold": 6.0}
    assert config(outputs / "static")["int8_outliers"] == {"mode": "static"}
    for outliers, threshold in (("default", 6.0), ("dynamic", 6.0), ("none", 0.0)):
        out = tmp_path / outliers
        reattend.apply(Recipe(steps=(Int8(format="bitsandbytes", outliers=outliers),)), demo.MODEL, out)
        assert config(out)["quantization_config"]["llm_int8_threshold"] == threshold
        assert "int8_outliers" not in config(out)


def test_damaged_side_files_are_refused(outputs, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(outputs / "static", folder)
    (folder / "int8_outliers" / "layer-00003.safetensors").unlink()
    with pytest.raises(Refusal, match=r"int8_outliers/layer-00003.safetensors: is missing"):
        reattend.load(folder)


@pytest.mark.parametrize("family", ["gemma2", "bert", "opt", "phi3"])
def test_linears_that_share_an_input_share_their_columns(models, family):
    """So they can be fused; also where no norm feeds them that could be smoothed."""
    source = source_of(open_checkpoint(models(family)))
    kind = transformers.AutoModelForMaskedLM if family == "bert" else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(models(family), dtype=torch.float32).eval()
    ids = torch.randint(3, 90, (4, 32), generator=torch.Generator().manual_seed(0))
    step, statistics = Int8(outliers="static"), {}
    step.calibrate(source, lambda *texts: layer_passes(model, source.family, {"calibration": ids}), statistics)
    for file, content in step.side_files(source, statistics):
        found = load(content)
        inputs = {}
        for name, columns in found.items():
            if name.endswith("outlier_columns"):
                inputs.setdefault(name.split(".")[-2].split("_")[0], tuple(columns.tolist()))
        for names in (("q", "k", "v"), ("query", "key", "value"), ("gate", "up")):
            if names[0] in inputs:
                assert len({inputs[name] for name in names}) == 1, file
        assert found


def test_slices_of_a_16_bit_model_are_16_bit(tmp_path):
    recipe = Recipe(steps=(Int8(outliers="static"),), calibration=str(TEXT), windows=4, window=64)
    reattend.apply(recipe, demo.MODEL, tmp_path / "out")
    found = load_file(tmp_path / "out" / "int8_outliers" / "layer-00001.safetensors")
    assert {v.dtype for name, v in found.items() if name.endswith("outlier_weight")} == {torch.bfloat16}


def test_a_share_that_buys_no_column_is_plain_w8a8(tmp_path):
    recipe = Recipe(steps=(Int8(outliers="static", outlier_share=1e-6),), calibration=str(TEXT), windows=2, window=64)
    reattend.apply(recipe, demo.MODEL, tmp_path / "out")
    assert reattend.load(tmp_path / "out").model is not None


def test_refusals():
    for settings, message in (
        ({"activations": "none", "outliers": "static"}, "static does nothing when activations are left in 16 bit"),
        ({"activations": "none", "outliers": "dynamic"}, "dynamic does nothing"),
        ({"threshold": 3.0}, "threshold: does nothing with outliers: none"),
        ({"outliers": "dynamic", "outlier_share": 0.5}, "outlier_share: does nothing with outliers: dynamic"),
    ):
        with pytest.raises(Refusal, match=message):
            reattend.plan(Recipe(steps=(Int8(**settings),)), demo.MODEL)
