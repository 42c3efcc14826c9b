"""The step `mla` from a checkpoint to a checkpoint, read by stock transformers."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import reattend
from reattend import demo
from reattend.calibration.fitting import Schedule
from reattend.calibration.layerwise import layer_passes
from reattend.checkpoint.index import open_checkpoint
from reattend.convert.mla.calibration import Conversion, convert, gather_moments, read_moments, slots_of_all
from reattend.convert.mla.geometry import read_geometry
from reattend.convert.mla.transform import Mla
from reattend.errors import Refusal
from reattend.families.source import source_of
from reattend.recipes.schema import Recipe
from tiny_models import CONFIGS

TEXTS = {"calibration": str(demo.EVAL_TEXT.with_name("select.txt")), "selection": str(demo.EVAL_TEXT)}
KV, HEAD_DIM, LAYERS = 2, 8, 2
WIDTH = KV * HEAD_DIM


def write_source(family, folder, **changes):
    """A tiny fp32 model with the demo's tokenizer and biases that are not zero."""
    name, settings = CONFIGS[family]
    settings = {
        **settings,
        "vocab_size": 2048,
        **({"sliding_window": None} if family == "mistral" else {}),
        **changes,
    }
    config = getattr(transformers, f"{name}Config")(**settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.3 if parameter.ndim == 1 else 0.0, 0.15)
    model.save_pretrained(folder)
    for file in demo.MODEL.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def recipe(**settings):
    step = Mla(**{"rope_dim": WIDTH, "latent_rank": WIDTH, "refit": False, **settings})
    return Recipe(steps=(step,), windows=2, selection_windows=1, window=48, **TEXTS)


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 5000.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 5000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 32},
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "rope"), [("llama", "default"), ("llama", "llama3"), ("mistral", "yarn"), ("qwen2", "default")]
)
def test_at_the_size_of_the_old_cache_nothing_is_lost(tmp_path, family, rope):
    source = write_source(family, tmp_path / "in", rope_parameters=dict(ROPES[rope]))
    planned = reattend.apply(recipe(), source, tmp_path / "out")
    report = reattend.verify(tmp_path / "out", against=source)
    assert report["problems"] == []
    assert report["logits_error"] < 2e-4  # the latent norm's 1e-6 and fp32
    assert planned.summary()["cache_bytes_per_token_after"] == LAYERS * 2 * WIDTH * 4
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == "deepseek_v3"
    assert config["tie_word_embeddings"] == (family == "llama")
    assert not list((tmp_path / "out").glob("*.py"))


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mla")
    source = write_source("llama", folder / "in")
    planned = reattend.apply(recipe(rope_dim=8, latent_rank=12, refit=True, refit_steps=4), source, folder / "out")
    return planned, folder / "out"


def load(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def test_the_cache_holds_what_the_plan_said(compressed):
    planned, folder = compressed
    model, _ = load(folder)
    cache = model(torch.arange(11)[None] + 5, use_cache=True).cache
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert held == 11 * LAYERS * (8 + 12)
    assert planned.summary()["cache_bytes_per_token_after"] == LAYERS * (8 + 12) * 4


def test_a_left_padded_batch_generates_what_single_prompts_do(compressed):
    model, tokenizer = load(compressed[1])
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.convert_ids_to_tokens(0)
    prompts = ["The river", "In the year 1874 a bridge of iron was built where"]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    batch = model.generate(**tokenizer(prompts, return_tensors="pt", padding=True), **options)
    for row, prompt in zip(batch, prompts, strict=True):
        single = model.generate(**tokenizer(prompt, return_tensors="pt"), **options)[0]
        assert row[-8:].tolist() == single[-8:].tolist()


def test_a_converted_model_is_inspected_and_quantised(compressed, tmp_path):
    planned = reattend.apply("int8", compressed[1], tmp_path / "int8")
    assert planned.source.family.model_type == "deepseek_v3"
    report = reattend.verify(tmp_path / "int8", against=compressed[1])
    assert report["problems"] == []
    assert report["logits_error"] < 0.1


def test_vllm_gets_an_untied_head_default_rope_and_its_own_eps(tmp_path):
    source = write_source("llama", tmp_path / "in", rms_norm_eps=1e-6)
    reattend.apply(recipe(target="vllm", rope_dim=4, latent_rank=28), source, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert (config["attention_bias"], config["tie_word_embeddings"]) == (False, False)
    report = reattend.verify(tmp_path / "out", against=source)  # at eps 1e-6 both engines' norms agree
    assert report["problems"] == []


@pytest.mark.parametrize(
    ("family", "changes", "settings", "message"),
    [
        ("qwen3", {}, {}, "normalises queries and keys"),
        ("gemma2", {}, {}, "caps its scores"),
        ("phi3", {}, {}, "fuses"),
        ("mixtral", {}, {}, "experts"),
        ("opt", {}, {}, "learned positions"),
        ("gpt2", {}, {}, "learned positions"),
        ("bert", {}, {}, "learned positions"),
        ("mistral", {"sliding_window": 64}, {}, "sliding_window"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16}, {}, "sliding_window"),
        ("llama", {"mlp_bias": True}, {}, "mlp_bias"),
        ("llama", {}, {"rope_dim": WIDTH + 2}, "rope_dim"),
        ("llama", {}, {"latent_rank": WIDTH + 1}, "latent_rank"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, {}, "dynamic"),
        ("qwen2", {}, {"target": "vllm", "rope_dim": 8}, "biases"),
        ("llama", {}, {"target": "vllm", "rope_dim": 6}, "must divide"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
         {"target": "vllm", "rope_dim": 8}, "default RoPE"),
    ],
)  # fmt: skip
def test_what_the_format_cannot_hold_is_refused_by_name(models, tmp_path, family, changes, settings, message):
    supported = family in ("llama", "mistral", "qwen2")
    folder = write_source(family, tmp_path / "in", **changes) if supported else models(family)
    with pytest.raises(Refusal, match=message):
        recipe(**settings).steps[0].check(source_of(open_checkpoint(folder)))


def test_a_model_that_runs_in_16_bit_is_calibrated_in_32(tmp_path):
    """Models run in their own dtype where the device is no CPU."""
    folder = write_source("llama", tmp_path / "in")
    source = source_of(open_checkpoint(folder))
    geometry = read_geometry(source)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    torch.manual_seed(0)
    texts = {name: torch.randint(0, 2048, (2, 48)) for name in ("calibration", "selection")}
    moments = [
        read_moments(gather_moments(layer, geometry, 48)) for layer in layer_passes(model, source.family, texts)
    ]
    pair_S, kept_YS = slots_of_all(moments, geometry, 4, None)
    how = Conversion(geometry, 16, True, Schedule(steps=2))
    for layer in layer_passes(model, source.family, texts):
        _, errors = convert(layer, moments[layer.index], (pair_S, kept_YS[layer.index]), how)
        assert 0 < errors["refit"] <= errors["closed_form"] < 0.5


def test_auto_is_the_largest_multiple_of_16_within_the_budget(tmp_path):
    source = write_source("llama", tmp_path / "in")  # 2 x 2 heads x 8 = 32 numbers per token and layer
    planned = reattend.plan(recipe(latent_rank="auto", cache_budget=0.8, rope_dim=8), source)  # 25 - 8 = 17
    assert planned.summary()["cache_bytes_per_token_after"] == LAYERS * (16 + 8) * 4
    assert planned.result.config["kv_lora_rank"] == 16
    assert any("latent_rank is 16" in remark for remark in planned.remarks)
    with pytest.raises(Refusal, match=r"cache_budget: 0\.5 leaves no 16"):
        reattend.plan(recipe(latent_rank="auto", cache_budget=0.5, rope_dim=8), source)


@pytest.mark.parametrize(
    "settings",
    [
        {"latent_rank": "auto"},
        {"latent_rank": 16, "cache_budget": 0.5},
        {"latent_rank": 16, "perplexity_budget": 0.5},
        {"latent_rank": "auto", "cache_budget": 0.5, "perplexity_budget": 0.5},
    ],
)
def test_auto_needs_one_budget(settings):
    with pytest.raises(ValueError, match="auto needs a cache_budget or a perplexity_budget"):
        Mla(**settings)


@pytest.mark.parametrize("pruned", ["q_proj", "k_proj", "v_proj", "o_proj"])
@pytest.mark.parametrize("refit", [False, True])
def test_a_layer_whose_attention_is_pruned_converts(tmp_path, pruned, refit):
    """Block expansion and pruning leave projections of zeros."""
    source = write_source("llama", tmp_path / "in")
    tensors = load_file(source / "model.safetensors")
    tensors[f"model.layers.1.self_attn.{pruned}.weight"].zero_()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    reattend.apply(recipe(rope_dim=8, latent_rank=16, refit=refit, refit_steps=2), source, tmp_path / "out")
    assert reattend.verify(tmp_path / "out", against=source)["problems"] == []


class Stopped(Exception):
    pass


def test_an_interrupted_conversion_goes_on_where_it_stopped(tmp_path, monkeypatch):
    source = write_source("llama", tmp_path / "in")
    reattend.apply(recipe(rope_dim=8, latent_rank=12), source, tmp_path / "undisturbed")
    calls = []

    def stop(phase, done, total):
        calls.append(phase)
        if len(calls) == LAYERS + 1:  # after the first pass and one converted layer
            raise Stopped

    with pytest.raises(Stopped):
        reattend.apply(recipe(rope_dim=8, latent_rank=12), source, tmp_path / "out", progress=stop)
    monkeypatch.setattr("reattend.convert.mla.transform.gather_moments", None)  # a second first pass would fail
    reattend.apply(recipe(rope_dim=8, latent_rank=12), source, tmp_path / "out", resume=True)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "undisturbed" / file).read_bytes()
