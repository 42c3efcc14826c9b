"""Latent attention of the portable model: what its caches hold, and absorbed decode against the expanded form."""

import copy

import pytest
import torch
import transformers
from test_latent_attention import GENERATE, IDS, absorbed, pair, steps
from torch import nn

import reattend
from reattend.families.portable import PORTABLE
from reattend.modeling.int8 import Int8Linear
from reattend.modeling.int8_loading import load_int8
from reattend.modeling.latent_attention import PortableLatentAttention
from reattend.modeling.latent_cache import LatentLayer
from reattend.modeling.portable.configuration_reattend import ReattendConfig
from reattend.modeling.portable.modeling_reattend import ReattendForCausalLM
from reattend.quantize.int8.transform import Int8
from reattend.recipes.schema import Recipe

__all__ = ["absorbed"]
RANKS, ROPE, LAYERS = [20, 28], 8, 2
LATENT = {"rank": RANKS, "rope_dim": ROPE, "pairs": [[0, 1, 1, 3], [0, 2, 5, 6]]}
BASE = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 14, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    "max_position_embeddings": 128, "latent_attention": LATENT, "auto_map": PORTABLE["reattend"].auto_map,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
WINDOW = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}
VARIANTS = {
    "plain": {"latent_attention": LATENT | {"rank": 24}},
    "norms": {"qk_norm": True, "rope_parameters": YARN},
    "norms and biases": {"qk_norm": True, "attention_bias": True, "output_bias": True},
    "biases and gates": {"attention_bias": True, "attention_gates": {"kind": "elementwise"}},
    "window": WINDOW,
}


def save(folder, **changes):
    torch.manual_seed(0)
    model = ReattendForCausalLM(ReattendConfig(**BASE | changes)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.5 if parameter.ndim == 1 else 0.0, 0.3)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=VARIANTS)
def folder(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("latent") / "model"
    save(place, **VARIANTS[request.param])
    return place


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 2e-5), ("float64", 1e-12)])
@torch.no_grad()
def test_logits_of_prefill_chunks_and_single_tokens(folder, absorbed, dtype, limit):
    stock, ours = pair(folder, dtype)
    want = stock(IDS).logits
    for model in (stock, ours):
        got, _ = steps(model)
        assert (got - want).abs().max() < limit * want.abs().max()
    assert type(ours.model.layers[0].self_attn) is PortableLatentAttention
    assert [shape[2] for shape in absorbed].count(1) == 2 * LAYERS
    assert (ours(IDS).logits - want).abs().max() < limit * want.abs().max()


@pytest.mark.parametrize("options", GENERATE.values(), ids=GENERATE)
@pytest.mark.parametrize("padded", [False, True])
def test_generation_is_that_of_the_expanded_form(folder, absorbed, options, padded):
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    if padded:
        mask[0, :7] = 0
        ids[0, :7] = 0
    if "prompt_lookup_num_tokens" in options:
        ids, mask = ids[:1], mask[:1]
    options = options | {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask}
    want, got = (model.generate(ids, **options) for model in pair(folder, "float64"))
    assert torch.equal(got, want)
    assert absorbed


@torch.no_grad()
def test_caches_hold_rows_of_each_layers_size(tmp_path):
    save(tmp_path / "model", **WINDOW)
    for model in pair(tmp_path / "model"):
        _, cache = steps(model)
        first, second = cache.layers
        assert type(first) is transformers.cache_utils.DynamicSlidingWindowLayer
        assert [first.keys.shape, first.values.shape] == [(2, 1, 8, RANKS[0]), (2, 1, 8, ROPE)]
        assert [second.keys.shape, second.values.shape] == [(2, 1, 20, RANKS[1]), (2, 1, 20, ROPE)]
    assert type(second) is LatentLayer


@torch.no_grad()
def test_a_cache_of_whole_layers_is_masked_to_the_window(tmp_path, absorbed):
    save(tmp_path / "model", **WINDOW)
    found = []
    for model in pair(tmp_path / "model", "float64"):
        cache = transformers.DynamicCache()  # no config: nothing slides
        model(IDS[:, :15], cache=cache)
        found += [model(IDS[:, i : i + 1], cache=cache).logits for i in range(15, 20)]
        whole = model(IDS).logits[:, 15:]
        torch.testing.assert_close(torch.cat(found[-5:], 1), whole, rtol=1e-10, atol=1e-10)
    assert len(absorbed) == 5 * LAYERS


@torch.no_grad()
def test_clipped_softmax_runs_expanded(tmp_path, absorbed):
    save(tmp_path / "clipped", clipped_softmax={"gamma": -0.02, "zeta": 1.01})
    stock, ours = pair(tmp_path / "clipped", "float64")
    torch.testing.assert_close(steps(ours)[0], steps(stock)[0], rtol=1e-9, atol=1e-9)
    assert not absorbed
    for attention in ("eager", "sdpa"):
        stock.set_attn_implementation(attention)
        torch.testing.assert_close(steps(stock)[0], stock(IDS).logits, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_static_cache_runs_expanded(folder, absorbed):
    found = []
    for model in pair(folder, "float64"):
        cache = transformers.StaticCache(config=model.config, max_cache_len=24)
        found.append(torch.cat([model(IDS[:, s:e], cache=cache).logits for s, e in ((0, 14), (14, 15), (15, 16))], 1))
        torch.testing.assert_close(found[-1], model(IDS[:, :16]).logits, rtol=1e-9, atol=1e-9)
    assert not absorbed


def test_gradients_are_those_of_the_expanded_form(folder):
    found = []
    for model in pair(folder, "float64"):
        model.requires_grad_(True)
        logits, _ = steps(model, (12, 1, 1))
        logits.square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-10 * float(found[0].abs().max()))


@torch.no_grad()
def test_eager_attention_gives_weights_of_every_head(folder):
    model = reattend.load(folder, runtime="stock").model
    model.set_attn_implementation("eager")
    attentions = model(IDS, output_attentions=True).attentions
    assert [tuple(weights.shape) for weights in attentions] == [(2, 4, 20, 20)] * LAYERS
    torch.testing.assert_close(attentions[0].sum(-1), torch.ones(2, 4, 20))


@torch.no_grad()
def test_what_was_saved_is_what_is_loaded(tmp_path):
    made = save(tmp_path / "model", qk_norm=True)
    again = ReattendForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(again(IDS).logits, made(IDS).logits)
    assert again.model.layers[1].self_attn.pairs.tolist() == LATENT["pairs"][1] * 2
    assert "pairs" not in str(list(again.state_dict()))
    moved = copy.deepcopy(again).to(torch.float64)
    assert (moved(IDS).logits - made(IDS).logits).abs().max() < 1e-3


def test_a_model_without_weights_starts_small():
    model = ReattendForCausalLM(ReattendConfig(**BASE | {"qk_norm": True, "initializer_range": 0.05}))
    q_rope = model.model.layers[0].self_attn.q_rope.detach()
    assert abs(float(q_rope.std()) - 0.05) < 0.01
    assert not any("self_attn" in name for name in model._tp_plan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": [20]}, "rank is neither"),
        ({"rank": 0}, "rank is neither"),
        ({"rank": [20, True]}, "rank is neither"),
        ({"pairs": [[0, 1, 1, 3]]}, "pairs are not"),
        ({"rope_dim": 10}, "pairs are not"),
        ({"pairs": [[0, 1, 1, 7], [0, 1, 2, 3]]}, "no index"),
    ],
)
def test_a_config_that_says_nothing_possible_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ReattendConfig(**BASE | {"latent_attention": LATENT | changes})


@pytest.fixture(scope="module", params=["none", "int8"])
def quantised(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8")
    save(folder / "in", qk_norm=True, attention_bias=True, **WINDOW)
    reattend.apply(Recipe(steps=(Int8(activations=request.param),)), folder / "in", folder / "out")
    return folder


@torch.no_grad()
def test_int8_on_top_is_the_expanded_form_on_the_same_codes(quantised, absorbed):
    want = steps(load_int8(quantised / "out"))[0]
    assert not absorbed
    ours = reattend.load(quantised / "out").model
    layer = ours.model.layers[1].self_attn
    assert type(layer.kv_b_proj) is Int8Linear
    assert type(layer.kv_a_proj_with_mqa) is Int8Linear
    got = steps(ours)[0]
    assert absorbed
    assert (got - want).norm() < 1e-5 * want.norm()
    before = steps(reattend.load(quantised / "in").model)[0]
    assert (got - before).norm() < 0.05 * before.norm()
