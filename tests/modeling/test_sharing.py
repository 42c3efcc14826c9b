"""The portable model with shared attention: every way to run it gives the numbers of one forward pass."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

import reattend
from reattend.kernels.shared_decode import follow
from reattend.modeling import attention_backend
from reattend.modeling.portable.configuration_reattend import ReattendConfig
from reattend.modeling.portable.modeling_reattend import ReattendForCausalLM
from tiny_models import GQA

IDS = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(0))
TYPES = ["sliding_attention", "full_attention"] * 3
SHARED = {"attention_sharing": [None, None, 0, 1, 0, None], "attention_drop": [5]}
KINDS = {"full": {}, "sliding": {"sliding_window": 6, "layer_types": TYPES}, "biased": {"attention_bias": True}}


def model(kind="full", dtype=torch.float64):
    torch.manual_seed(0)
    keys = GQA | {"head_dim": 8, "num_hidden_layers": 6, "initializer_range": 0.3, "tie_word_embeddings": True}
    return ReattendForCausalLM(ReattendConfig(**keys | KINDS[kind] | SHARED)).to(dtype).eval()


def close(ours, theirs, atol=1e-12):
    assert torch.allclose(ours, theirs, rtol=0, atol=atol), float((ours - theirs).abs().max())


@pytest.fixture(params=KINDS)
def shared(request):
    return model(request.param)


@torch.no_grad()
def pieces(shared, cache, cuts=(7, 8, 15, 20)):
    starts = (0, *cuts)
    found = [shared(IDS[:, a:b], cache=cache).logits for a, b in zip(starts, cuts, strict=False)]
    return torch.cat(found, 1)


@torch.no_grad()
def test_caches(shared):
    whole = shared(IDS).logits
    close(pieces(shared, DynamicCache(config=shared.config)), whole)
    close(pieces(shared, StaticCache(config=shared.config, max_cache_len=24)), whole)


@torch.no_grad()
def test_followers_cache_values_alone(shared):
    cache = DynamicCache(config=shared.config)
    shared(IDS, cache=cache)
    kept = shared.config.sliding_window or 21
    tokens = [min(20, kept - 1) if kind == "sliding_attention" else 20 for kind in shared.config.layer_types]
    numbers = [layer.keys.numel() + layer.values.numel() for layer in cache.layers]
    parts = [2, 2, 1, 1, 1, 0]
    assert numbers == [2 * 2 * 8 * n * part for n, part in zip(tokens, parts, strict=True)]


@torch.no_grad()
@pytest.mark.parametrize("name", ["eager", "sdpa", "reattend"])
def test_attention_functions(shared, name):
    whole = shared(IDS).logits
    reattend.register_attention()
    shared.set_attn_implementation(name)
    close(shared(IDS).logits, whole, atol=1e-4 if name == "eager" else 1e-12)  # eager's softmax is fp32
    close(pieces(shared, DynamicCache(config=shared.config)), whole, atol=1e-4 if name == "eager" else 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_single_queries_read_their_leaders_scores(shared, padded, monkeypatch):
    """By our attention a follower's decode is `follow`, with a mask and without, and the numbers are the same."""
    calls = []
    monkeypatch.setattr(attention_backend, "follow", lambda row, value: calls.append(value) or follow(row, value))
    reattend.register_attention()
    mask = torch.ones_like(IDS)
    mask[0, :4] = 1 - int(padded)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    found = {}
    for name in ("sdpa", "reattend"):
        shared.set_attn_implementation(name)
        for kind in ("dynamic", "static"):
            cache = DynamicCache(config=shared.config)
            if kind == "static":
                cache = StaticCache(config=shared.config, max_cache_len=24)
            shared(IDS[:, :12], attention_mask=mask[:, :12], position_ids=places[:, :12], cache=cache)
            found[name, kind] = torch.cat([
                shared(
                    IDS[:, i : i + 1], attention_mask=mask[:, : i + 1], position_ids=places[:, i : i + 1], cache=cache
                ).logits
                for i in range(12, 20)
            ], 1)  # fmt: skip
    assert len(calls) == 2 * 8 * 3
    for kind in ("dynamic", "static"):
        close(found["reattend", kind], found["sdpa", kind])


@torch.no_grad()
def test_left_padding(shared):
    mask = torch.cat([torch.zeros(2, 5, dtype=torch.int64), torch.ones_like(IDS)], 1)
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.int64), IDS], 1)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    close(shared(padded, attention_mask=mask, position_ids=places).logits[:, 5:], shared(IDS).logits)


@torch.no_grad()
def test_beams(shared):
    """Sequences change places between steps: values of followers go with them."""
    options = {"num_beams": 4, "do_sample": False, "max_new_tokens": 10, "pad_token_id": 0}
    cached = shared.generate(IDS[:, :6], **options)
    assert torch.equal(cached, shared.generate(IDS[:, :6], use_cache=False, **options))


@torch.no_grad()
def test_reordered(shared):
    cache = DynamicCache(config=shared.config)
    shared(IDS[:, :5], cache=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    found = shared(IDS.flip(0)[:, 5:9], cache=cache).logits
    close(found, shared(IDS.flip(0)[:, :9]).logits[:, 5:])


@torch.no_grad()
def test_cropped(shared):
    cache = DynamicCache(config=shared.config)
    if shared.config.sliding_window:
        cache.activate_past_recording()
    shared(IDS[:, :12], cache=cache)
    cache.crop(-4)
    close(shared(IDS[:, 8:], cache=cache).logits, shared(IDS).logits[:, 8:])


def test_gradients_with_recomputed_layers():
    """What a leader leaves for its followers survives gradient checkpointing, and carries their gradients back."""
    plain, recomputed = model(), model()
    recomputed.activation_checkpointing_enable()
    for one in (plain, recomputed):
        one.train()
        one(IDS, labels=IDS).loss.backward()
    for (name, ours), theirs in zip(recomputed.named_parameters(), plain.parameters(), strict=True):
        close(ours.grad, theirs.grad)
        assert float(ours.grad.abs().sum()) > 0, name


def test_followers_give_their_leader_gradients():
    shared = model()
    for layer in (0, 1):  # the leaders' own outputs go nowhere
        shared.model.layers[layer].self_attn.o_proj.weight.data.zero_()
    shared(IDS, labels=IDS).loss.backward()
    assert float(shared.model.layers[0].self_attn.q_proj.weight.grad.abs().sum()) > 0


@torch.no_grad()
def test_saved_and_loaded(shared, tmp_path):
    shared.save_pretrained(tmp_path)
    loaded, info = ReattendForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float64)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(loaded(IDS).logits, shared(IDS).logits)


@torch.no_grad()
def test_it_compiles_whole():
    shared = model(dtype=torch.float32)
    compiled = torch.compile(shared, fullgraph=True, backend="eager")
    close(compiled(IDS, use_cache=False).logits, shared(IDS).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"attention_sharing": [None] * 5}, "expected a layer or null for each of 6 layers"),
        ({"attention_sharing": [None, 0, 1, None, None, None]}, "layer 2 can't follow 1"),
        ({"attention_sharing": [None, None, 3, None, None, None]}, "layer 2 can't follow 3"),
        ({"attention_sharing": [None, True, None, None, None, None]}, "expected a layer or null"),
        ({"attention_drop": [0]}, "tell the length of the cache"),
        ({"attention_drop": [6]}, "expected different layers from 0 to 5"),
        ({"attention_drop": [2], "attention_sharing": [None, None, None, 2, None, None]}, "layer 3 can't follow 2"),
        (
            {"attention_sharing": [None, 0, None, None, None, None], "layer_types": TYPES, "sliding_window": 6},
            "layers 0 and 1 attend in different ways",
        ),
    ],
)
def test_configs_that_are_refused(keys, message):
    with pytest.raises(Exception, match=message):
        ReattendConfig(**GQA | {"head_dim": 8, "num_hidden_layers": 6} | keys)
