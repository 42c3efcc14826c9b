"""Absorbed decode and expanded prefill under stock DeepseekV3: the same numbers as stock, from the same cache."""

import copy

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

import reattend
from reattend.modeling import latent_attention
from reattend.modeling.latent_attention import LatentAttention
from reattend.modeling.latent_cache import LatentLayer

RANK, ROPE, LAYERS = 24, 8, 2
BASE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 4, "kv_lora_rank": RANK, "qk_rope_head_dim": ROPE, "qk_nope_head_dim": 8, "v_head_dim": 12,
    "q_lora_rank": None, "first_k_dense_replace": LAYERS, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    "max_position_embeddings": 128,
}  # fmt: skip
VARIANTS = {
    "plain": {},
    "biases and a query latent": {"kv_lora_rank": 32, "q_lora_rank": 33, "attention_bias": True, "tie_word_embeddings": True},
    "half rotation": {"rope_interleave": False},
    "wide heads": {"qk_nope_head_dim": 32, "v_head_dim": 32},
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.5, 2.0, 3.0], "factor": 1.0,
            "long_factor": [1.0, 1.5, 2.0, 3.0], "original_max_position_embeddings": 128, "attention_factor": 1.0,
        }
    },
    "experts": {"first_k_dense_replace": 1},
}  # fmt: skip
IDS = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(0))


def save(folder, **changes):
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**BASE | changes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.5 if parameter.ndim == 1 else 0.0, 0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=VARIANTS)
def folder(request, tmp_path_factory):
    return save(tmp_path_factory.mktemp("mla") / "model", **VARIANTS[request.param])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save(tmp_path_factory.mktemp("mla") / "plain")


def pair(folder, dtype="float32"):
    return [reattend.load(folder, dtype=dtype, runtime=runtime).model for runtime in ("stock", "auto")]


@pytest.fixture
def absorbed(monkeypatch):
    """Counts the calls that ran absorbed."""
    calls = []
    real = latent_attention.mla_decode
    monkeypatch.setattr(latent_attention, "mla_decode", lambda *a, **k: (calls.append(a[0].shape), real(*a, **k))[1])
    return calls


def steps(model, sizes=(12, 3, 1, 1, 3), **options):
    """Logits of a prefill, a chunk, single tokens and another chunk, one after another over one cache."""
    cache, found, start = transformers.DynamicCache(config=model.config), [], 0
    for size in sizes:
        ids = IDS[:, start : start + size]
        found.append(model(ids, cache=cache, use_cache=True, **options).logits)
        start += size
    return torch.cat(found, 1), cache


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 2e-5), ("float64", 1e-12)])
@torch.no_grad()
def test_logits_of_prefill_chunks_and_single_tokens(folder, absorbed, dtype, limit):
    stock, ours = pair(folder, dtype)
    if dtype == "float64" and stock.config.first_k_dense_replace < LAYERS:
        pytest.skip("stock experts do not run in fp64")
    want, got = steps(stock)[0], steps(ours)[0]
    assert (got - want).abs().max() < limit * want.abs().max()
    assert [shape[2] for shape in absorbed[::LAYERS]] in ([3, 1, 1, 3], [1, 1, 3], [1, 1])
    assert (ours(IDS).logits - stock(IDS).logits).abs().max() == 0


GENERATE = {"greedy": {}, "beams": {"num_beams": 3}, "look-up": {"prompt_lookup_num_tokens": 3}}


@pytest.mark.parametrize("options", GENERATE.values(), ids=GENERATE)
@pytest.mark.parametrize("padded", [False, True])
def test_generation_is_stocks(folder, absorbed, options, padded):
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    if padded:
        mask[0, :7] = 0
        ids[0, :7] = 0
    if "prompt_lookup_num_tokens" in options:
        ids, mask = ids[:1], mask[:1]
    options = options | {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask}
    want, got = (model.generate(ids, **options) for model in pair(folder))
    assert torch.equal(got, want)
    assert absorbed


def test_the_cache_holds_latent_and_rope_rows(plain):
    _, ours = pair(plain)
    with torch.no_grad():
        _, cache = steps(ours)
    layers = cache.layers
    assert all(type(layer) is LatentLayer for layer in layers)
    assert sum(layer.keys.numel() + layer.values.numel() for layer in layers) == 2 * 20 * LAYERS * (RANK + ROPE)
    assert all(layer._latent.shape[-2] - 20 <= 256 for layer in layers)


@torch.no_grad()
def test_a_token_does_not_copy_the_cache(plain):
    _, ours = pair(plain)
    _, cache = steps(ours, (12, 1))
    before = [layer.keys.data_ptr() for layer in cache.layers]
    for _ in range(3):
        ours(IDS[:, :1], cache=cache)
    assert [layer.keys.data_ptr() for layer in cache.layers] == before


def beams(cache):
    cache.reorder_cache(torch.tensor([1, 0]))


CHANGES = {
    "beams": beams,
    "crop": lambda cache: cache.crop(-3),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "reset": lambda cache: cache.reset(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_a_changed_cache_goes_on(plain, change):
    found = []
    for model in pair(plain):
        _, cache = steps(model, (12, 1))
        change(cache)
        rows = cache.layers[0].keys.shape[0] if cache.layers[0].keys is not None else 2
        ids = IDS[:1, :2].expand(rows, -1)
        first = model(ids, cache=cache).logits
        found.append(torch.cat([first, model(ids[:, :1], cache=cache).logits], 1))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_caches_are_exchanged_with_stock_and_copied(plain, absorbed):
    stock, ours = pair(plain)
    for first, second in ((stock, ours), (ours, stock)):
        _, cache = steps(first, (12, 1))
        kept = copy.deepcopy(cache)
        want = stock(IDS[:, :1], cache=copy.deepcopy(cache)).logits
        torch.testing.assert_close(second(IDS[:, :1], cache=cache).logits, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(stock(IDS[:, :1], cache=kept).logits, want, rtol=1e-4, atol=1e-4)
    assert absorbed


def test_growing_past_a_buffers_room(plain):
    stock, ours = pair(plain)
    long = IDS[:1].repeat(1, 20)[:, :300]
    found = []
    with torch.inference_mode():
        caches = [transformers.DynamicCache(), transformers.DynamicCache()]  # no config: layers made one by one
        for model, cache in zip((stock, ours), caches, strict=True):
            model(IDS[:1, :2], cache=cache)
    with torch.no_grad():  # a buffer of inference mode can't be written to here
        for model, cache in zip((stock, ours), caches, strict=True):
            found.append(torch.cat([model(token[None, None], cache=cache).logits for token in long[0]], 1))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


ELSEWHERE = {
    "training": lambda model: (model.train(), {})[1],
    "eager": lambda model: (model.set_attn_implementation("eager"), {})[1],
    "a hook": lambda model: (model.model.layers[0].self_attn.kv_b_proj.register_forward_hook(lambda *_: None), {})[1],
    "static": lambda model: {"cache": transformers.StaticCache(config=model.config, max_cache_len=32)},
    "offloaded": lambda model: {"cache": NoOffload(config=model.config)},
}


class NoOffload(transformers.DynamicCache):
    """Offloading needs a GPU: this one only says that it does."""

    offloading = property(lambda self: True, lambda self, value: None)

    def update(self, keys, values, layer, *args, **kwargs):
        return self.layers[layer].update(keys, values)


@pytest.mark.parametrize("change", ELSEWHERE.values(), ids=ELSEWHERE)
@torch.no_grad()
def test_where_stock_runs(plain, absorbed, change):
    found = []
    for model in pair(plain):
        options = change(model)
        cache = options.get("cache") or transformers.DynamicCache(config=model.config)
        model(IDS[:, :8], cache=cache)
        found.append(model(IDS[:, 8:9], cache=cache).logits)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    assert len(absorbed) == (LAYERS - 1 if change is ELSEWHERE["a hook"] else 0)


@torch.no_grad()
def test_autocast_and_a_mask_per_head_run_stock(plain, absorbed):
    mask = torch.ones(2, 4, 1, 13, dtype=torch.bool)
    mask[:, 1, :, 3:5] = False
    found = []
    for model in pair(plain):
        _, cache = steps(model, (12,))
        found.append(model(IDS[:, :1], cache=copy.deepcopy(cache), attention_mask=mask).logits)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(model(IDS[:, :1], cache=cache).logits)
    assert not absorbed
    assert torch.equal(found[2], found[0])
    assert torch.equal(found[3], found[1])


def test_gradients_are_stocks(plain):
    found = []
    for model in pair(plain):
        for train in (True, False):
            model.train(train).zero_grad()
            logits, _ = steps(model, (12, 1, 1))
            logits.square().mean().backward()
            found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-3, atol=1e-4 * float(found[0].abs().max()))


def test_the_model_stays_a_stock_checkpoint(folder, tmp_path, absorbed):
    stock, ours = pair(folder)
    assert list(ours.state_dict()) == list(stock.state_dict())
    moved = copy.deepcopy(ours).to(torch.float64)
    moved.load_state_dict(stock.state_dict())
    with torch.no_grad():
        moved, stock = (model.to(torch.float32) for model in (moved, stock))  # experts do not run in fp64
        want = steps(stock)[0]
        assert (steps(moved)[0] - want).abs().max() < 2e-5 * want.abs().max()
    assert absorbed
    ours.save_pretrained(tmp_path / "saved")
    saved, before = load_file(tmp_path / "saved/model.safetensors"), load_file(folder / "model.safetensors")
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[name], before[name]) for name in before)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "saved").architectures == ["DeepseekV3ForCausalLM"]


def test_weights_on_the_disk_run_stock(plain):
    model = reattend.load(plain, offload=True).model
    assert type(model.model.layers[0].self_attn) is DeepseekV3Attention
    assert type(reattend.load(plain).model.model.layers[0].self_attn) is LatentAttention
