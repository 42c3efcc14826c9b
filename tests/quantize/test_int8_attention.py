"""The step `int8_attention`: what is measured, what is chosen, and who honours it."""

import json
import logging

import pytest
import torch
import transformers
from safetensors.torch import load_file

import reattend
from reattend import demo
from reattend.calibration.attention_calls import observed_attention
from reattend.calibration.layerwise import layer_passes
from reattend.checkpoint.index import open_checkpoint
from reattend.errors import Refusal
from reattend.families.attention_kinds import KEY, KINDS, declared_kinds
from reattend.families.source import source_of
from reattend.kernels.attention import reference
from reattend.kernels.attention_int8 import Quantization, attention_int8
from reattend.pipeline.inspection import inspect
from reattend.quantize.attention.similarity import similarity, worst
from reattend.quantize.attention.transform import Int8Attention
from reattend.recipes.schema import Recipe, parse_recipe
from tiny_models import write_model

IDS = torch.randint(10, 2000, (2, 96), generator=torch.Generator().manual_seed(0))


def settings(**step):
    texts = {"calibration": str(demo.SELECT_TEXT), "windows": 2, "window": 96}
    return parse_recipe({"steps": [{"step": "int8_attention", **step}], **texts}, "test")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8_attention") / "out"
    reattend.apply(settings(), demo.MODEL, folder)
    return folder


def config(folder):
    return json.loads((folder / "config.json").read_text())


def test_similarity_by_hand():
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0])
    assert similarity(a, b).tolist() == pytest.approx([0.6, 4 / 7])
    zero = torch.zeros(2)
    assert similarity(zero, zero).tolist() == [1.0, 0.0]
    assert similarity(zero, b)[0] == 0
    assert worst([torch.tensor([0.9, 0.3]), torch.tensor([0.8, 0.1])]).tolist() == pytest.approx([0.8, 0.3])


@pytest.mark.parametrize(
    ("measured", "kind"),
    [
        ((0.9996, 0.9999), "int8_fp8"),
        ((0.9990, 0.9981), "int8_fp16"),
        ((0.9970, 0.9979), "exact"),
        ((0.9995, 1.0), "int8_fp8"),
    ],
)
def test_the_fastest_kind_above_the_threshold_is_chosen(measured, kind):
    values = torch.tensor([[cosine, 0.0] for cosine in measured], dtype=torch.float64)
    statistics = {"0": {"int8_fp8": values[0], "int8_fp16": values[1]}}
    assert Int8Attention().findings(statistics)["kinds"] == [kind]
    alone = Int8Attention(values="fp16").findings(statistics)["kinds"]
    assert alone == ["exact" if kind == "exact" else "int8_fp16"]


def test_what_is_measured_is_the_layers_own_attention():
    """Queries and keys as stock makes them: attention over them, through o_proj, is the layer's own output."""
    model = transformers.AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype=torch.float64)
    source = source_of(open_checkpoint(demo.MODEL))
    before = model.config._attn_implementation
    for layer in layer_passes(model, source.family, {"calibration": IDS}):
        seen, outputs = [], []
        attention = layer.module.get_submodule("self_attn")

        def observe(query, key, value, options, seen=seen):
            seen.append(reference.attention(query, key, value, options)[0])

        with observed_attention(layer.module, observe):
            layer.run([("self_attn", lambda m, a, k, output, outputs=outputs: outputs.append(output[0]))])
        assert len(seen) == len(IDS)
        for mixed, output in zip(seen, outputs, strict=True):
            torch.testing.assert_close(
                attention.o_proj(mixed.transpose(1, 2).flatten(2)), output, rtol=1e-9, atol=1e-9
            )
    assert model.config._attn_implementation == before


def test_the_output_says_what_was_measured_and_chosen(out):
    found = json.loads((out / "reattend.json").read_text())["findings"][0]
    assert config(out)[KEY] == found["kinds"]
    assert len(found["kinds"]) == 5
    assert set(found["kinds"]) <= set(KINDS)
    for kind, values in found["cosine_per_layer"].items():
        assert all(0.9 < value <= 1 for value in values), kind
    chosen = zip(found["kinds"], *found["cosine_per_layer"].values(), strict=True)
    for kind, fp8, fp16 in chosen:
        assert kind == ("int8_fp8" if fp8 >= 0.9995 else "int8_fp16" if fp16 >= 0.998 else "exact")


def test_weights_are_the_sources_and_stock_runs_them_exactly(out):
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, demo.MODEL))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    stock, source = (
        transformers.AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (out, demo.MODEL)
    )
    with torch.inference_mode():
        assert torch.equal(stock(IDS).logits, source(IDS).logits)
    report = reattend.verify(out, against=demo.MODEL)
    assert (report["problems"], report["logits_error"]) == ([], 0.0)


def test_load_honours_the_choice(out, tmp_path, monkeypatch, caplog):
    kinds = ["int8_fp16", "exact", "int8_fp8", "exact", "int8_fp16"]
    folder = tmp_path / "chosen"
    folder.mkdir()
    for file in out.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config(out) | {KEY: kinds}))
    calls = []

    def spy(query, key, value, options, how, backend="auto"):
        calls.append((how.values, backend))
        return attention_int8(query, key, value, options, how, backend=backend)

    monkeypatch.setattr("reattend.modeling.attention_backend.attention_int8", spy)
    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        model = reattend.load(folder, dtype="float32").model
        exact = reattend.load(demo.MODEL, dtype="float32").model(IDS).logits
        logits = model(IDS).logits
        assert calls == [("fp16", "auto"), ("fp8", "auto"), ("fp16", "auto")]
        assert torch.equal(logits, exact)  # on a CPU
        calls.clear()
        simulated = reattend.load(folder, dtype="float32", simulate=True).model
        found = simulated(IDS).logits
        assert [backend for _, backend in calls] == ["reference"] * 3
        assert 1e-4 < float((found - exact).norm() / exact.norm()) < 0.1
        calls.clear()
        simulated.generate(IDS[:, :20], max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert [backend for _, backend in calls].count("reference") == 3  # the prompt; what follows is exact
    assert inspect(folder)["attention"] == {"int8_fp16": 2, "exact": 2, "int8_fp8": 1}
    assert inspect(demo.MODEL)["attention"] == "exact"


def test_evaluation_measures_the_quantised_model(out):
    report = reattend.evaluate(out, demo.EVAL_TEXT, against=demo.MODEL, window=96, windows=3, dtype="float32")
    assert report["attention"] == "reattend_int8_simulated"
    assert 0 < report["kl_mean"] < 0.01


def test_padded_batches_are_quantised_as_single_runs(out):
    model = reattend.load(out, dtype="float32", simulate=True).model
    mask = torch.ones_like(IDS)
    mask[0, :31] = 0
    with torch.inference_mode():
        positions = (mask.cumsum(1) - 1).clamp_min(0)  # rotated by other angles, numbers would round to other codes
        batch = model(IDS, attention_mask=mask, position_ids=positions).logits
        alone = model(IDS[:1, 31:]).logits
    assert float((batch[0, 31:] - alone[0]).norm() / alone.norm()) < 1e-5


BAD = [
    ("exact", "is no list"),
    (["exact"] * 4, "has 4 entries for 5 layers"),
    (["exact"] * 4 + ["int4"], "holds 'int4', none of exact, int8_fp16, int8_fp8"),
]


@pytest.mark.parametrize(("value", "message"), BAD, ids=[message for _, message in BAD])
def test_a_damaged_choice_is_refused(value, message):
    with pytest.raises(Refusal, match=message):
        declared_kinds({KEY: value}, 5)


def declare(folder, kinds, **more):
    config = json.loads((folder / "config.json").read_text()) | {KEY: kinds, **more}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_damaged_choice_is_refused_by_name_everywhere(tmp_path):
    folder = declare(write_model("llama", tmp_path / "damaged"), ["exact"])
    for call in (reattend.load, inspect, lambda model: reattend.plan("int8", model)):
        with pytest.raises(
            Refusal, match=r"damaged/config.json: reattend_attention has 1 entries for 2 layers; remove"
        ):
            call(folder)


def test_families_that_count_their_layers_by_another_name(tmp_path):
    folder = declare(write_model("gpt2", tmp_path / "in", torch.float32), ["int8_fp16", "exact"])
    ids = IDS[:, :64] % 90 + 3
    with torch.no_grad():
        simulated = reattend.load(folder, simulate=True).model(ids).logits
        exact = reattend.load(folder, runtime="stock").model(ids).logits
    assert 0 < float((simulated - exact).norm() / exact.norm()) < 0.05


def test_what_load_can_not_simulate_is_refused(tmp_path):
    folder = declare(write_model("llama", tmp_path / "in"), ["int8_fp16", "exact"])
    with pytest.raises(Refusal, match="auto with simulate"):
        reattend.load(folder, runtime="stock", simulate=True)
    with pytest.raises(Refusal, match="runtime 'fast'"):
        reattend.load(folder, runtime="fast")
    assert (
        reattend.load(folder, offload=True, simulate=True).model.config._attn_implementation
        == "reattend_int8_simulated"
    )
    declare(folder, ["int8_fp16", "exact"], attn_implementation="eager")
    with pytest.raises(Refusal, match="can't be honoured: LlamaForCausalLM runs attention 'eager'"):
        reattend.load(folder)


def test_models_that_can_not_have_it(tmp_path):
    for family, message in (("gemma2", "soft-capped"), ("bert", "encoder")):
        folder = write_model(family, tmp_path / family)
        with pytest.raises(Refusal, match=message):
            reattend.plan(Recipe(steps=(Int8Attention(),)), folder)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3", "opt", "gpt2"])
def test_every_other_family(family, tmp_path):
    """Each has its own shapes: what is observed must be attention, and quantised it must be near."""
    folder = write_model(family, tmp_path / "in", torch.float32)
    model = reattend.load(folder).model
    source = source_of(open_checkpoint(folder))
    statistics = {}
    ids = IDS[:, :64] % 90 + 3
    step = Int8Attention()
    step.check(source)
    step.calibrate(source, lambda *texts, **few: layer_passes(model, source.family, {"calibration": ids}), statistics)
    found = step.findings(statistics)
    assert all(value > 0.99 for value in found["cosine_per_layer"]["int8_fp16"])
    assert all(0 < value < 0.1 for value in found["relative_l1_per_layer"]["int8_fp16"])


def test_rotated_keys_are_what_is_smoothed():
    """A bias on keys ruins int8 without smoothing: the very case that the step's measure must see."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 512, 64, generator=generator) for _ in "qkv")
    k += 8 * torch.randn(64, generator=generator)
    exact = reference.attention(q, k, v, reattend.kernels.attention.Options())[0]
    with_, without = (
        similarity(attention_int8(q, k, v, how=Quantization(smooth_k=smooth), backend="reference"), exact)
        for smooth in (True, False)
    )
    assert with_[0] > 0.9995 > without[0]
