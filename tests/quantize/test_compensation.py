import itertools

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import reattend
from reattend import demo
from reattend.calibration.layerwise import layer_passes
from reattend.checkpoint.index import open_checkpoint
from reattend.errors import Refusal
from reattend.families.source import source_of
from reattend.quantize.int8.compensation import compensated_codes
from reattend.quantize.int8.formulas import channel_scale, quantize_channels
from reattend.quantize.int8.inputs import sampled
from reattend.quantize.int8.simulation import codes_of
from reattend.quantize.int8.transform import Int8
from reattend.recipes.schema import Recipe

TEXT = demo.EVAL_TEXT.with_name("select.txt")


def problem(outputs, inputs, tokens, seed=0):
    """A weight and inputs of a few strong directions, as activations have."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) * torch.logspace(0, -2, inputs)[:, None]
    x = torch.randn(tokens, inputs, generator=generator) @ mix
    return torch.randn(outputs, inputs, generator=generator), x


def cost(w, codes, scale, moment):
    left = w.double() - codes.double() * scale.double()
    return ((left @ moment) * left).sum(1)


def test_uncorrelated_inputs_leave_nothing_to_compensate():
    w, _ = problem(6, 20, 1)
    codes, scale = quantize_channels(w, torch.float32)
    moment = torch.diag(torch.logspace(-3, 3, 20, dtype=torch.float64))
    assert torch.equal(compensated_codes(w, scale, moment), codes)
    assert torch.equal(compensated_codes(w, scale, torch.zeros(20, 20)), codes)


def test_two_channels_by_hand():
    """x_2 = x_1 but for 1 %: the error of the first weight moves into the second, 0.3 + 0.4 -> 0 + 1, not 0 + 0."""
    moment = torch.tensor([[1.0, 0.99], [0.99, 1.0]], dtype=torch.float64)
    w = torch.tensor([[0.3, 0.4, 127.0]])
    full = torch.block_diag(moment, torch.ones(1, 1, dtype=torch.float64) * 1e-3)
    assert compensated_codes(w, torch.ones(1, 1), full, damping=0.0).tolist() == [[0, 1, 127]]


def test_close_to_the_best_of_all_roundings():
    """Every combination of up and down, for 6 channels: at most 1.6 of the least cost; nearest costs more."""
    w, x = problem(8, 6, 400)
    w *= 3
    scale = torch.ones(8, 1)
    moment = (x.T @ x).double() / len(x)
    down = w.floor()
    choices = torch.tensor(list(itertools.product((0.0, 1.0), repeat=6)))
    least = torch.stack([cost(w, down + choice, scale, moment) for choice in choices]).amin(0)
    found = cost(w, compensated_codes(w, scale, moment, damping=0.0), scale, moment)
    nearest = cost(w, w.round(), scale, moment)
    assert found.sum() < 1.6 * least.sum()
    assert found.sum() < 0.5 * nearest.sum()


@pytest.mark.parametrize(("outputs", "inputs", "tokens"), [(1, 1, 3), (5, 300, 2000), (7, 129, 40), (3, 128, 500)])
def test_no_worse_than_nearest_at_any_shape(outputs, inputs, tokens):
    """Blocks that do not divide, fewer tokens than channels, one number."""
    w, x = problem(outputs, inputs, tokens)
    codes, scale = quantize_channels(w, torch.float32)
    moment = (x.T @ x).double() / tokens
    found = compensated_codes(w, scale, moment)
    assert found.dtype == torch.int8
    assert found.abs().max() <= 127
    share = cost(w, found, scale, moment).sum() / cost(w, codes, scale, moment).sum()
    assert share <= (1 if inputs == 1 else 0.6)


def test_blocks_change_nothing(monkeypatch):
    import reattend.quantize.int8.compensation as compensation

    w, x = problem(4, 70, 500)
    scale = channel_scale(w, torch.float32)
    moment = (x.T @ x).double()
    whole = compensated_codes(w, scale, moment)
    for block in (1, 7, 64):
        monkeypatch.setattr(compensation, "_BLOCK", block)
        assert torch.equal(compensated_codes(w, scale, moment), whole)


def compensated(**settings):
    steps = (Int8(rounding="compensated", **settings),)
    return Recipe(steps=steps, calibration=str(TEXT), windows=6, window=64)


def test_w8a16_loses_less_and_loads_in_stock_transformers(tmp_path):
    for name, recipe in (
        ("nearest", Recipe(steps=(Int8(activations="none"),))),
        ("compensated", compensated(activations="none")),
    ):
        planned = reattend.apply(recipe, demo.MODEL, tmp_path / name)
        assert planned.texts == (("calibration",) if name == "compensated" else ())
    errors = [reattend.verify(tmp_path / n, against=demo.MODEL) for n in ("nearest", "compensated")]
    assert [e["problems"] for e in errors] == [[], []]
    assert errors[1]["logits_error"] < 0.8 * errors[0]["logits_error"]


@pytest.mark.parametrize("family", ["gemma2", "phi3", "opt", "qwen3", "bert"])
def test_every_family_loses_less_than_by_nearest_rounding(models, family):
    """Fused projections, linears that no feed feeds, biases, an encoder: W8 logits against the source's."""
    source = source_of(open_checkpoint(models(family)))
    kind = transformers.AutoModelForMaskedLM if family == "bert" else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(models(family), dtype=torch.float32).eval()
    ids = torch.randint(3, 90, (24, 32), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        exact = model(ids[:4]).logits
    state = {name: value.clone() for name, value in model.state_dict().items()}
    errors = []
    for rounding in ("nearest", "compensated"):
        step, statistics = Int8(rounding=rounding, activations="none"), {}
        model.load_state_dict(state)
        if rounding == "compensated":
            step.calibrate(
                source, lambda *texts: layer_passes(model, source.family, {"calibration": ids}), statistics
            )
        for group in step.groups(source):
            for name in group.reads:
                found = statistics[group.key] if group.key else {}
                short = name.removeprefix(source.layer_prefix(group.key)) if group.key else name
                codes, scale = codes_of(short.removesuffix(".weight"), state[name], found, source, state[name].dtype)
                model.state_dict()[name].copy_(codes * scale)
        with torch.inference_mode():
            errors.append(float((model(ids[:4]).logits - exact).norm() / exact.norm()))
    assert 0 < errors[1] < 0.85 * errors[0]


def test_refusals(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for file in demo.MODEL.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(Refusal, match=r"up_proj.weight' is F8_E4M3"):
        reattend.plan(compensated(), folder)
    with pytest.raises(Refusal, match="--calibration"):
        reattend.apply(Recipe(steps=(Int8(rounding="compensated"),), window=64), demo.MODEL, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_interrupted_calibration_goes_on_where_it_stopped(tmp_path, monkeypatch):
    import reattend.quantize.int8.transform as transform

    recipe = Recipe(
        steps=(Int8(outliers="smooth", rounding="compensated"),), calibration=str(TEXT), selection=str(demo.EVAL_TEXT),
        windows=4, selection_windows=2, window=64,
    )  # fmt: skip
    reattend.apply(recipe, demo.MODEL, tmp_path / "whole")
    learn, calls = transform.learn_layer, []

    def stop_in_the_third(layer, *args):
        calls.append(layer.index)
        if calls == [0, 1, 2]:
            raise KeyboardInterrupt
        return learn(layer, *args)

    monkeypatch.setattr(transform, "learn_layer", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        reattend.apply(recipe, demo.MODEL, tmp_path / "out")
    reattend.apply(recipe, demo.MODEL, tmp_path / "out", resume=True)
    assert calls == [0, 1, 2, 2, 3, 4]
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("windows", "tokens", "most"), [(4, 100, 200), (4, 10, 400), (1000, 64, 640), (24, 1024, 4096), (3, 1024, 100)]
)
def test_rows_are_spread_over_windows_and_tokens(windows, tokens, most):
    """Half of the rows wanted, all of them, more windows than can give 64 rows, the usual case, too few wanted."""
    rows = [sampled(window, windows, tokens, most) for window in range(windows)]
    count = sum(map(len, rows))
    assert 0.6 * min(most, windows * tokens) <= count <= most + 64
    first = sum(int((row == 0).sum()) for row in rows)
    assert first == sum(1 for row in rows if len(row))
    assert first <= count / min(tokens, 64)
    assert all(len(row) == 0 or tokens - tokens // 32 - 2 <= row.max() < tokens for row in rows)


def test_rows_by_hand():
    assert sampled(0, 1, 200, 100)[:3].tolist() == [0, 2, 4]
    assert [len(sampled(window, 100, 128, 3200)) for window in range(4)] == [64, 0, 64, 0]
