"""The step `mla` with target: portable: what the native format can't hold, down to the last bit of fp64."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_mla_step import TEXTS, Stopped, write_source

import reattend
from reattend import demo
from reattend.checkpoint.index import open_checkpoint
from reattend.convert.clipped_softmax.transform import ClippedSoftmax
from reattend.convert.gates.transform import Gates
from reattend.convert.mla.transform import Mla
from reattend.convert.portable.transform import Portable
from reattend.errors import Refusal
from reattend.families.source import source_of
from reattend.pipeline.inspection import inspect
from reattend.quantize.int8.transform import Int8
from reattend.recipes.schema import Recipe

LAYERS = 2
# family -> what its tiny model has, and the numbers of all its keys (KV heads x head dim)
SOURCES = {
    "llama": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e3, "factor": 4.0,
                                   "original_max_position_embeddings": 32}}, 16),
    "mistral": ({"sliding_window": 20}, 16),
    "qwen2": ({}, 16),
    "qwen3": ({"hidden_size": 48, "head_dim": 10, "rms_norm_eps": 1e-3}, 20),
}  # fmt: skip
IDS = torch.randint(3, 2048, (2, 40), generator=torch.Generator().manual_seed(0))


def source(family, folder, dtype=torch.float64):
    """A tiny model in fp64, its weights fp32 numbers: what calibration, in fp32, sees of it is all there is."""
    write_source(family, folder, **SOURCES[family][0])
    transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    return folder


def recipe(**settings):
    step = Mla(**{"refit": False, "target": "portable", **settings})
    return Recipe(steps=(step,), windows=2, selection_windows=1, window=48, **TEXTS)


def load(folder, dtype=torch.float64):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=True).eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Outputs by family: at full rank, and at ranks that differ between layers."""
    found = {}

    def get(family, exact):
        if (family, exact) not in found:
            folder = tmp_path_factory.mktemp(family)
            width = SOURCES[family][1]
            sizes = {"rope_dim": width, "latent_rank": width} if exact else {"rope_dim": 6, "latent_rank": (9, 14)}
            planned = reattend.apply(recipe(**sizes), source(family, folder / "in"), folder / "out")
            found[family, exact] = planned, folder / "in", folder / "out"
        return found[family, exact]

    return get


@pytest.mark.parametrize("family", SOURCES)
@torch.no_grad()
def test_at_full_rank_logits_are_the_sources(made, family):
    planned, before, out = made(family, True)
    theirs, ours = load(before), load(out)
    want = theirs(IDS).logits
    assert (ours(IDS).logits - want).abs().max() < 1e-10
    cache = transformers.DynamicCache(config=ours.config)
    steps = [ours(IDS[:, start:end], cache=cache).logits for start, end in ((0, 25), (25, 33), (33, 34), (34, 40))]
    assert (torch.cat(steps, 1) - want).abs().max() < 1e-10
    width = SOURCES[family][1]
    assert planned.summary()["cache_bytes_per_token_after"] == LAYERS * 2 * width * 8


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_in_a_process_without_reattend_it_is_the_source(made, family):
    _, before, out = made(family, True)
    report = reattend.verify(out, against=before)
    assert report["problems"] == []
    assert report["logits_error"] < 1e-5


@torch.no_grad()
def test_more_tokens_than_the_window_were_seen(made):
    """The limit of mistral is one of its window: without it the same weights say something else."""
    _, _, out = made("mistral", True)
    ours = load(out)
    windowed = ours(IDS).logits
    ours.config.layer_types = ["full_attention"] * LAYERS
    for layer in ours.model.layers:
        layer.self_attn.sliding_window = None
    assert (ours(IDS).logits - windowed)[:, 20:].abs().max() > 1e-3


@pytest.mark.parametrize("family", SOURCES)
@torch.no_grad()
def test_the_cache_holds_what_the_plan_said(made, family):
    planned, _, out = made(family, False)
    ours = load(out)
    cache = ours(IDS[:, :11], use_cache=True).cache
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert held == 2 * 11 * (9 + 14 + 2 * 6)
    assert planned.summary()["cache_bytes_per_token_after"] == (9 + 14 + 2 * 6) * 8
    assert source_of(open_checkpoint(out)).cache_numbers_per_token == 9 + 14 + 2 * 6
    config = json.loads((out / "config.json").read_text())
    assert config["latent_attention"]["rank"] == [9, 14]
    assert [len(row) for row in config["latent_attention"]["pairs"]] == [3, 3]
    described = inspect(out)
    assert "latent" in described["features"]
    assert described["parameters"] == ours.num_parameters()
    assert described["cache_bytes_per_token"] == (9 + 14 + 2 * 6) * 8


def static(ours, ids):
    cache = transformers.StaticCache(config=ours.config, max_cache_len=48)
    steps = [ours(ids[:, start:end], cache=cache).logits for start, end in ((0, 12), (12, 13), (13, 14))]
    return torch.cat(steps, 1)


@pytest.mark.parametrize("family", SOURCES)
@torch.no_grad()
def test_a_static_cache_and_none_say_the_same(made, family):
    ours = load(made(family, False)[2])
    assert (static(ours, IDS) - ours(IDS[:, :14]).logits).abs().max() < 1e-10


@pytest.mark.parametrize("family", SOURCES)
def test_a_left_padded_batch_generates_what_single_prompts_do(made, family):
    ours = load(made(family, False)[2])
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.MODEL)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.convert_ids_to_tokens(0)
    prompts = ["The river", "In the year 1874 a bridge of iron was built where the old ferry had crossed"]
    for more in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **more}
        batch = ours.generate(**tokenizer(prompts, return_tensors="pt", padding=True), **options)
        for row, prompt in zip(batch, prompts, strict=True):
            single = ours.generate(**tokenizer(prompt, return_tensors="pt"), **options)[0]
            assert row[-8:].tolist() == single[-8:].tolist()


@torch.no_grad()
def test_beams_are_those_of_the_source_at_full_rank(made):
    _, before, out = made("qwen3", True)
    options = {"max_new_tokens": 10, "num_beams": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(load(out).generate(IDS, **options), load(before).generate(IDS, **options))


def error(before, out):
    with torch.no_grad():
        want = load(before)(IDS).logits
        return float((load(out)(IDS).logits - want).norm() / want.norm())


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_the_error_falls_with_the_rank(made, tmp_path, family):
    _, before, _ = made(family, True)
    errors = []
    for rank in (4, 12, 24):
        reattend.apply(recipe(rope_dim=8, latent_rank=rank), before, tmp_path / str(rank))
        findings = json.loads((tmp_path / str(rank) / "reattend.json").read_text())["findings"][0]
        errors.append(sum(findings["relative_error_per_layer"]["closed_form"]))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.3 * errors[0]
    assert error(before, tmp_path / "24") < error(before, tmp_path / "4")


def test_an_interrupted_conversion_goes_on_where_it_stopped(made, tmp_path, monkeypatch):
    _, before, _ = made("qwen3", True)
    fit = recipe(rope_dim=6, latent_rank=(9, 14), refit=True, refit_steps=2)
    reattend.apply(fit, before, tmp_path / "undisturbed")
    calls = []

    def stop(phase, done, total):
        calls.append(phase)
        if len(calls) == LAYERS + 1:  # after the first pass and one converted layer
            raise Stopped

    with pytest.raises(Stopped):
        reattend.apply(fit, before, tmp_path / "out", progress=stop)
    monkeypatch.setattr("reattend.convert.mla.transform.gather_moments", None)  # a second first pass would fail
    reattend.apply(fit, before, tmp_path / "out", resume=True)
    for file in ("model.safetensors", "config.json", "latent_reattend.py"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "undisturbed" / file).read_bytes()


def test_a_plan_knows_who_can_serve_it(made):
    planned, before, out = made("qwen3", False)
    alone = recipe(rope_dim=6, latent_rank=(9, 14))
    both = alone.model_copy(update={"steps": (*alone.steps, Int8())})
    for plan in (planned, reattend.plan(both, before), reattend.plan("int8", out)):
        engines = plan.summary()["engines"]
        assert engines["transformers"].startswith("yes")
        assert {engines[name][:3] for name in ("vllm", "sglang")} == {"no:"}


@torch.no_grad()
def test_gates_and_clipping_go_on_top(made, tmp_path):
    _, _, out = made("qwen3", False)
    want = load(out)(IDS).logits
    gates = Gates(kind="all_heads_linear")
    reattend.apply(Recipe(steps=(gates, ClippedSoftmax(alpha=0.0))), out, tmp_path / "out")
    gated = load(tmp_path / "out")
    assert gated.model.layers[0].self_attn.gate is not None
    assert gated.model.layers[0].self_attn.gamma is not None
    assert (gated(IDS).logits - want).abs().max() < 1e-6  # softmax is clipped in fp32
    reattend.apply(Recipe(steps=(ClippedSoftmax(alpha=4.0),)), out, tmp_path / "clipped")
    assert (load(tmp_path / "clipped")(IDS).logits - want).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("family", "changes", "settings", "message"),
    [
        ("gemma2", {}, {}, "caps its scores"),
        ("phi3", {}, {}, "fuses"),
        ("mixtral", {}, {}, "experts"),
        ("opt", {}, {}, "learned positions"),
        ("bert", {}, {}, "learned positions"),
        ("qwen3", {}, {"target": "transformers"}, "target: portable"),
        ("mistral", {"sliding_window": 64}, {"target": "vllm", "rope_dim": 4}, "target: portable"),
        ("llama", {"mlp_bias": True}, {"target": "transformers"}, "target: portable"),
        ("llama", {}, {"latent_rank": (8, 8, 8)}, "3 ranks for 2 layers"),
        ("llama", {}, {"latent_rank": (8, 29)}, "29 is more than 28"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, {}, "dynamic"),
    ],
)
def test_what_neither_form_holds_is_refused_in_one_line(models, tmp_path, family, changes, settings, message):
    folder = write_source(family, tmp_path / "in", **changes) if changes else models(family)
    with pytest.raises(Refusal, match=message) as refusal:
        recipe(**{"rope_dim": 4, "latent_rank": 8, **settings}).steps[0].check(source_of(open_checkpoint(folder)))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latent_rank": (8, 8), "target": "transformers"}, "target: portable holds a list"),
        ({"query_rank": 8}, "leave it out"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Mla(**{"target": "portable", "latent_rank": 8, **settings})


def test_a_converted_model_is_not_converted_again(made):
    _, _, out = made("llama", False)
    with pytest.raises(Refusal, match="latent attention already"):
        recipe(rope_dim=4, latent_rank=4).steps[0].check(source_of(open_checkpoint(out)))


def test_a_portable_model_is_a_source_as_its_original_is(made, tmp_path):
    _, before, out = made("qwen3", True)
    reattend.apply(Recipe(steps=(Portable(),)), before, tmp_path / "portable")
    reattend.apply(recipe(rope_dim=20, latent_rank=20), tmp_path / "portable", tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    reattend.apply(Recipe(steps=(Gates(),)), tmp_path / "portable", tmp_path / "gated")
    with pytest.raises(Refusal, match="run mla first"):
        recipe(rope_dim=4, latent_rank=4).steps[0].check(source_of(open_checkpoint(tmp_path / "gated")))


def test_a_cache_budget_goes_to_the_layers_that_need_it(tmp_path):
    """128 numbers per token and layer; half are 8 + 48 on average. What the second layer puts out is nothing."""
    before = write_source("llama", tmp_path / "in", hidden_size=128, head_dim=16, num_key_value_heads=4)
    tensors = load_file(before / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"].zero_()
    save_file(tensors, before / "model.safetensors", {"format": "pt"})
    auto = recipe(rope_dim=8, latent_rank="auto", cache_budget=0.5)
    planned = reattend.plan(auto, before)
    assert any("48 is their mean" in remark for remark in planned.remarks)
    done = reattend.apply(auto, before, tmp_path / "out")
    findings = json.loads((tmp_path / "out/reattend.json").read_text())["findings"][0]
    assert findings["latent_rank"] == [80, 16]
    for plan in (planned, done):
        assert plan.summary()["cache_bytes_per_token_after"] == (80 + 16 + 2 * 8) * 4
    reattend.apply(recipe(rope_dim=8, latent_rank=(80, 16)), before, tmp_path / "by hand")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "by hand" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
    reattend.apply(recipe(rope_dim=8, latent_rank=48), before, tmp_path / "equal")
    assert error(before, tmp_path / "out") < error(before, tmp_path / "equal")
