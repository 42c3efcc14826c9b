import pytest
import torch
import transformers

import reattend
from reattend import demo
from reattend.checkpoint.index import open_checkpoint
from reattend.errors import Refusal
from reattend.families.source import source_of
from reattend.quantize.int8.migration import layer_tensors, migrate, producer_rows
from reattend.quantize.int8.smoothing import best_factors, share, smoothing_factors, w8a8_error
from reattend.quantize.int8.transform import Int8
from reattend.recipes.schema import Recipe

TEXT = demo.EVAL_TEXT.with_name("select.txt")


def test_factors_by_hand():
    # 64^0.5 / 4^0.5 = 4; 2^0.75 / 2^0.25 = 2^0.5, which rounds (half to even, in the exponent 0.5) to 1
    assert smoothing_factors(torch.tensor([64.0, 0.0, 3.0]), torch.tensor([4.0, 1.0, 0.0]), 0.5).tolist() == [4, 1, 1]
    assert smoothing_factors(torch.tensor([2.0]), torch.tensor([2.0]), 0.75).tolist() == [1]


def test_shared_channels_take_the_largest_of_their_group():
    # 4 query heads on 2 KV heads, head_dim 2
    values = torch.tensor([1.0, 2, 3, 1, 5, 6, 4, 8])
    assert share(values, 4, 2).tolist() == [3, 2, 3, 2, 5, 8, 5, 8]


def test_error_is_zero_for_what_int8_holds_and_smoothing_helps_an_outlier():
    exact = torch.tensor([[127.0, -3.0], [127.0, 64.0]])
    assert w8a8_error(exact, [torch.tensor([[1.0, 127.0]])], torch.ones(2)) == 0
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 100
    w = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        narrow = x.to(dtype) * (100 if dtype == torch.float16 else 1)  # squares beyond what fp16 holds
        alpha, factors = best_factors(narrow, [w.to(dtype)], narrow.abs().amax(0), w.abs().amax(0), [0.3, 0.5, 0.7])
        assert alpha > 0, dtype
        assert factors.argmax() == 5
        assert w8a8_error(narrow, [w], factors) < 0.1 * w8a8_error(narrow, [w], torch.ones(32))
    x[3, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        best_factors(x, [w], w.abs().amax(0), w.abs().amax(0), [0.3])


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
            columns = source.size(source.family.linears[feed.consumers[0]][1])
            if columns != len(rows):
                kv, rep = source.num_kv_heads, int(source.get("heads")) // source.num_kv_heads
                rows = rows.reshape(kv, 1, -1).expand(kv, rep, -1).reshape(-1)
            factors[feed.producer] = torch.exp2(rows.float())
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
    assert smoothed < 0.5 * plain


def test_refusals(models):
    for family, settings, message in (
        ("llama", {"activations": "none"}, "nothing to smooth"),
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
