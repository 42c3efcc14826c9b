import json
from types import SimpleNamespace

import pytest
import torch
import transformers

import reattend
from reattend import demo
from reattend.checkpoint.index import open_checkpoint
from reattend.errors import Refusal
from reattend.families.source import source_of
from reattend.quantize.int8 import inputs
from reattend.quantize.int8.inputs import SharedInput
from reattend.quantize.int8.migration import layer_tensors, migrate, owners, producer_rows
from reattend.quantize.int8.smoothing import ExpectedError, best_factors, descend, smoothing_factors, w8a8_error
from reattend.quantize.int8.transform import Int8
from reattend.recipes.schema import Recipe

TEXT = demo.EVAL_TEXT.with_name("select.txt")


def test_factors_by_hand():
    # 64^0.5 / 4^0.5 = 4; 2^0.75 / 2^0.25 = 2^0.5; a channel of zeros keeps 1; exponents end at 10
    assert smoothing_factors(torch.tensor([64.0, 0.0, 3.0]), torch.tensor([4.0, 1.0, 0.0]), 0.5).tolist() == [4, 1, 1]
    assert smoothing_factors(torch.tensor([2.0]), torch.tensor([2.0]), 0.75).item() == pytest.approx(2**0.5)
    assert smoothing_factors(torch.tensor([1e9]), torch.tensor([1.0]), 1.0).item() == 1024


def test_columns_name_the_channel_that_produces_them(models):
    """4 query heads on 2 KV heads of head_dim 16: two query heads in turn read the same 16 value channels."""
    source = source_of(open_checkpoint(models("llama")))
    values = next(feed for feed in source.family.feeds if feed.producer == "self_attn.v_proj")
    kv, dim = source.num_kv_heads, source.head_dim
    repeat = int(source.get("heads")) // kv
    by_hand = [group * dim + d for group in range(kv) for _ in range(repeat) for d in range(dim)]
    assert repeat > 1
    assert owners(values, source).tolist() == by_hand
    norm = source.family.feeds[0]
    assert owners(norm, source).tolist() == list(range(source.size("hidden")))


def activations(rows=256, columns=32):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 100
    return x, torch.randn(16, columns, generator=torch.Generator().manual_seed(1))


def test_expected_error_is_the_simulated_one():
    """The closed form against rounding itself: within a tenth, for any s, of 256 channels (the largest has no error)."""
    x, w = activations(1024, 256)
    for seed in range(4):
        log_s = torch.randn(256, generator=torch.Generator().manual_seed(seed))
        log_s[5] += 2 * seed
        expected = float(ExpectedError(x, [w, 3 * w])(log_s))
        assert w8a8_error(x, [w, 3 * w], torch.exp2(log_s)) == pytest.approx(expected, rel=0.1)


def test_a_token_that_counts_eight_times_is_eight_tokens():
    """Tokens of one energy, so that repeating one does not move the median that the others are held against."""
    x = torch.nn.functional.normalize(torch.randn(20, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    eye, emphasis = torch.eye(32), torch.ones(20)
    emphasis[3] = 8
    repeated = torch.cat([x, x[3:4].expand(7, -1)])
    s = torch.rand(32, generator=torch.Generator().manual_seed(1)) + 0.5
    assert w8a8_error(x, [eye], s, emphasis) == pytest.approx(w8a8_error(repeated, [eye], s), rel=1e-5)
    assert w8a8_error(x, [eye], s, emphasis) != pytest.approx(w8a8_error(x, [eye], s), rel=1e-2)
    expected = ExpectedError(x, [eye], emphasis)(s.log2())
    assert float(expected) == pytest.approx(float(ExpectedError(repeated, [eye])(s.log2())), rel=1e-5)


def test_the_first_token_of_every_window_counts_more():
    layer = SimpleNamespace(
        module=torch.nn.Linear(4, 3), hidden={"calibration": torch.zeros(5, 9, 4)}, text="calibration"
    )
    shared = SharedInput(layer, "linear", moment=False)
    windows = torch.randn(5, 9, 4, generator=torch.Generator().manual_seed(0))
    for window in windows:
        shared.take(window)
    rows, emphasis = shared.finite_rows("calibration"), shared.emphasis("calibration")
    assert len(rows) == len(emphasis) == 45
    assert torch.equal(rows[emphasis > 1], windows[:, 0])
    assert set(emphasis.tolist()) == {1.0, inputs._FIRST_TOKEN}


def test_descent_beats_the_published_factors_and_respects_shared_channels():
    x, w = activations(2048)
    x[::50, :16] *= 20  # rare and high: ranges alone say too much about half of the channels
    owner = torch.arange(16).repeat_interleave(2)  # columns 2 r and 2 r + 1 share a factor
    error = ExpectedError(x, [w])
    largest = [v.abs().amax(0).reshape(16, 2).amax(1) for v in (x, w)]
    published = [smoothing_factors(*largest, alpha / 20) for alpha in range(21)]
    s = descend(error, published[10], owner)
    assert s.shape == (16,)
    assert error(s[owner].log2()) < 0.9 * min(error(p[owner].log2()) for p in published)


def test_error_is_zero_for_what_int8_holds_and_smoothing_helps_an_outlier():
    exact = torch.tensor([[127.0, -3.0], [127.0, 64.0]])
    assert w8a8_error(exact, [torch.tensor([[1.0, 127.0]])], torch.ones(2)) == 0
    x, w = activations(64)
    owner = torch.arange(32)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        narrow = x.to(dtype) * (100 if dtype == torch.float16 else 1)  # squares beyond what fp16 holds
        weight = w.to(dtype)
        factors, before, after = best_factors(narrow, narrow, [weight], narrow.abs().amax(0), owner)
        assert factors.argmax() == 5
        assert before == pytest.approx(w8a8_error(narrow, [weight], torch.ones(32)))
        assert after == pytest.approx(w8a8_error(narrow, [weight], factors))
        assert after < 0.1 * before, dtype


def test_dead_and_unread_channels_are_left_finite():
    x, w = activations()
    x[:, 3] = 0
    w[:, 7] = 0
    factors, before, after = best_factors(x, x, [w], x.abs().amax(0), torch.arange(32))
    assert torch.isfinite(factors).all()
    assert (factors > 0).all()
    assert after < before


FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "opt"]


@pytest.mark.parametrize("family", FAMILIES)
def test_migration_alone_changes_no_bit_of_the_logits(models, family):
    """The lossless limit: powers of two scale every product exactly."""
    source = source_of(open_checkpoint(models(family)))
    model = transformers.AutoModelForCausalLM.from_pretrained(models(family), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    if family in ("qwen2", "opt"):  # transformers starts biases at zero, which would hide a bias left behind
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    ids = torch.arange(20)[None] + 3
    with torch.inference_mode():
        before = model(ids).logits
    state = model.state_dict()
    for layer in range(source.num_layers):
        prefix = source.layer_prefix(layer)
        factors = {}
        for feed in source.family.feeds:
            rows = torch.randint(-4, 5, (producer_rows(feed, source),), generator=generator)
            factors[f"{feed.producer}.factors"] = torch.exp2(rows.float())
        names = layer_tensors(source, prefix)
        moved = {name: migrate(name.removeprefix(prefix), state[name], factors, source) for name in names}
        assert any(not torch.equal(moved[name], state[name]) for name in names)
        for name in names:
            state[name].copy_(moved[name])
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, before)


def smooth(**settings):
    texts = {"calibration": str(TEXT), "selection": str(demo.EVAL_TEXT)}
    return Recipe(steps=(Int8(outliers="smooth", **settings),), windows=4, selection_windows=2, window=64, **texts)


@pytest.mark.parametrize("layout", ["compressed-tensors", "bitsandbytes"])
def test_output_loads_in_stock_transformers(tmp_path, layout):
    planned = reattend.apply(smooth(format=layout), demo.MODEL, tmp_path / "out")
    report = reattend.verify(tmp_path / "out", against=demo.MODEL)
    assert report["problems"] == []
    assert 0 < report["logits_error"] < 0.1
    assert planned.texts == ("calibration", "selection")


def test_planted_outliers_are_smoothed_away(tmp_path):
    """Three input channels of every MLP scaled x20 at the norm, exactly undone in the weights, as real models have."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "in"
    folder.mkdir()
    for file in demo.MODEL.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(demo.MODEL / "model.safetensors")
    for layer in range(5):
        prefix = f"model.layers.{layer}."
        tensors[f"{prefix}post_attention_layernorm.weight"][[3, 40, 77]] *= 32
        for name in ("gate", "up"):
            tensors[f"{prefix}mlp.{name}_proj.weight"][:, [3, 40, 77]] /= 32
    save_file({k: v.clone() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    reattend.apply("int8", folder, tmp_path / "plain")
    reattend.apply(smooth(), folder, tmp_path / "smooth")
    plain, smoothed = (reattend.verify(tmp_path / n, against=folder)["logits_error"] for n in ("plain", "smooth"))
    assert smoothed < 0.25 * plain
    findings = json.loads((tmp_path / "smooth" / "reattend.json").read_text())["findings"][0]
    errors = findings["w8a8_error"]["post_attention_layernorm"]
    assert len(errors["before"]) == 5
    assert all(after < 0.1 * before for before, after in zip(errors["before"], errors["after"], strict=True))


def test_refusals(models):
    for family, settings, message in (
        ("llama", {"activations": "none"}, "smooth does nothing"),
        ("bert", {}, "no place"),
    ):
        with pytest.raises(Refusal, match=message):
            Int8(outliers="smooth", **settings).check(source_of(open_checkpoint(models(family))))
    source = source_of(open_checkpoint(models("opt")))
    del source.tensors["model.decoder.layers.1.final_layer_norm.weight"]
    with pytest.raises(Refusal, match="final_layer_norm has no weight"):
        Int8(outliers="smooth").check(source)
    source.config["activation_function"] = "gelu"
    with pytest.raises(Refusal, match="ReLU"):
        Int8(outliers="smooth").check(source)
