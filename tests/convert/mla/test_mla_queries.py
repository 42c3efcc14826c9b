"""Queries of low rank, against what they are the best of, and in stock DeepseekV3ForCausalLM."""

import json

import pytest
import torch
from test_mla_exact import random_source
from test_mla_native import compressed, layers_of, logits, native, run_directly, source_model
from test_mla_step import recipe, write_source

import reattend
from reattend.convert.mla.attention import compose
from reattend.convert.mla.exact import same_cache
from reattend.convert.mla.queries import factorise, truncate_queries
from reattend.convert.mla.rope import Rotary, default_frequencies
from reattend.errors import Refusal


@pytest.fixture
def layer():
    return compose(random_source(6, 3, 10, Rotary(default_frequencies(1e4, 10)), biased=True), same_cache(6, 3, 10))


def inputs(layer, windows=4, tokens=50):
    x = torch.randn(windows, tokens, layer.down_CE.shape[1], generator=torch.Generator().manual_seed(0)).double()
    x[..., 0] *= 10
    x[0, 0] *= 1000  # as the first token's: it must count as one token
    return x


def test_all_directions_lose_nothing(layer):
    x = inputs(layer)
    kept = truncate_queries(layer, x.shape[-1], x)
    assert torch.allclose(kept.query_HQE, layer.query_HQE, rtol=0, atol=1e-9)
    assert kept.query_bias_HQ is layer.query_bias_HQ


def score_error(layer, changed, x):
    """Mean square of what scores lose over all pairs of a query and a key, rotary pairs turned by any angle."""
    unit = (x / x.norm(dim=-1, keepdim=True)).flatten(0, 1)
    lost = torch.einsum("ne,hqe->nhq", unit, layer.query_HQE - changed.query_HQE)
    down = x.flatten(0, 1) @ layer.down_CE.T + layer.down_bias_C
    rank, free = layer.latent_rank, layer.key_HNL.shape[1]
    keys = torch.einsum("ml,hkl->mhk", down[:, :rank], layer.key_HNL)
    error = torch.einsum("nhk,mhk->nmh", lost[..., :free], keys).square().sum(-1).mean()
    # |q|^2 |k|^2 cos^2 of a pair, whose mean over angles is a half; pairs turn apart, so their products cancel.
    lost_pairs = lost[..., free:].unflatten(-1, (-1, 2)).square().sum(-1).sum(1).mean(0)
    key_pairs = down[:, rank:].unflatten(-1, (-1, 2)).square().sum(-1).mean(0)
    return float(error + (lost_pairs * key_pairs).sum() / 2)


@pytest.mark.parametrize("rank", [1, 5, 11])
def test_scores_lose_less_than_by_any_other_truncation(layer, rank):
    x = inputs(layer)
    kept = truncate_queries(layer, rank, x)
    assert torch.linalg.matrix_rank(kept.query_HQE.flatten(0, 1)) == rank
    least = score_error(layer, kept, x)
    up, down = factorise(layer.query_HQE.flatten(0, 1), rank)
    plain = (up @ down).view_as(layer.query_HQE)
    assert least < score_error(layer, type(layer)(**{**vars(layer), "query_HQE": plain}), x)
    for seed in range(5):  # and it is a minimum: nothing near it of that rank is better
        nudge = torch.randn(down.shape[1], down.shape[1], generator=torch.Generator().manual_seed(seed)).double()
        near = kept.query_HQE @ (torch.eye(len(nudge)).double() + 1e-2 * nudge / nudge.norm())
        assert least < score_error(layer, type(layer)(**{**vars(layer), "query_HQE": near}), x)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_stock_computes_what_was_truncated(family):
    model = source_model(family, torch.float64)
    converted = [
        truncate_queries(attention, 9, torch.randn(2, 30, model.config.hidden_size).double())
        for attention in compressed(model, 5, 20)
    ]
    want = run_directly(model, converted)
    stock = native(model, converted, torch.float64, query_rank=9)
    assert stock.config.q_lora_rank == 9 + (family == "qwen2")
    torch.testing.assert_close(logits(stock), want, rtol=1e-4, atol=2e-5 * float(want.std()))


def test_layers_of_the_source_have_more_directions():
    assert all(layer.q_HDE.flatten(0, 1).shape[1] > 9 for layer in layers_of(source_model("llama", torch.float64)))


@pytest.mark.parametrize(
    ("family", "target"), [("llama", "transformers"), ("qwen2", "transformers"), ("llama", "vllm")]
)
def test_the_step_writes_it(tmp_path, family, target):
    source = write_source(family, tmp_path / "in")
    settings = {"target": target, "rope_dim": 8} if target == "vllm" else {}
    planned = reattend.apply(recipe(query_rank=12, refit=True, refit_steps=2, **settings), source, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["q_lora_rank"] == 12 + (family == "qwen2")
    names = {spec for spec in planned.result.tensors if ".q_a_proj." in spec}
    assert any(name.endswith("bias") for name in names) == (target == "transformers")
    (found,) = json.loads((tmp_path / "out/reattend.json").read_text())["findings"]
    assert all(error > 0 for error in found["relative_error_per_layer"]["query_rank"])
    if target == "transformers":
        report = reattend.verify(tmp_path / "out", against=source)
        assert report["problems"] == []


def test_as_many_directions_as_the_input_has_lose_nothing(tmp_path):
    source = write_source("llama", tmp_path / "in")
    reattend.apply(recipe(query_rank=32), source, tmp_path / "out")
    assert reattend.verify(tmp_path / "out", against=source)["logits_error"] < 3e-4


def test_more_directions_than_there_are_refuse(tmp_path):
    source = write_source("llama", tmp_path / "in")
    with pytest.raises(Refusal, match="query_rank: 33 is more than the 32"):
        reattend.plan(recipe(query_rank=33), source)
