"""int8 on top of MLA: absorbed decode reads the latents that the int8 product would have read."""

import pytest
import torch
from test_latent_attention import IDS, absorbed, save, steps

import reattend
from reattend.modeling.int8 import Int8Linear
from reattend.modeling.int8_loading import load_int8
from reattend.modeling.latent_attention import LatentAttention, RoundedNorm
from reattend.quantize.int8.transform import Int8
from reattend.recipes.schema import Recipe

__all__ = ["absorbed"]
FORMATS = {
    "W8A16": {"activations": "none"},
    "W8A8": {},
    "bitsandbytes": {"format": "bitsandbytes"},
}


@pytest.fixture(scope="module", params=FORMATS)
def quantised(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8")
    save(folder / "in", attention_bias=True, q_lora_rank=33)
    reattend.apply(Recipe(steps=(Int8(**FORMATS[request.param]),)), folder / "in", folder / "out")
    return request.param, folder / "out"


@torch.no_grad()
def test_absorbed_is_expanded(quantised, absorbed):
    kind, folder = quantised
    want = steps(load_int8(folder))[0]
    assert not absorbed
    ours = reattend.load(folder).model
    layer = ours.model.layers[0].self_attn
    assert type(layer) is LatentAttention
    assert type(layer.kv_b_proj) is Int8Linear
    assert (type(layer.kv_a_layernorm) is RoundedNorm) == (kind != "W8A16")
    got = steps(ours)[0]
    assert absorbed
    assert (got - want).norm() < 1e-5 * want.norm()


@torch.no_grad()
def test_generation(quantised):
    kind, folder = quantised
    options = {"max_new_tokens": 10, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    got = reattend.load(folder).model.generate(IDS, **options)
    assert torch.equal(got, load_int8(folder).generate(IDS, **options))
    if kind == "W8A16":  # int8 activations round differently in stock's simulations, absorbed or not
        assert torch.equal(got, reattend.load(folder, runtime="stock").model.generate(IDS, **options))


def test_rounding_twice_is_rounding_once():
    codes = torch.randint(-127, 128, (6, 32), dtype=torch.int8)
    x = torch.randn(4, 5, 32, generator=torch.Generator().manual_seed(0))
    x[..., 7] *= 30
    for options in ({}, {"threshold": 6.0}):
        layer = Int8Linear(codes, torch.ones(6), **options)
        once = layer.rounded(x)
        torch.testing.assert_close(layer.rounded(once), once)
        torch.testing.assert_close(layer(once), layer(x))
        torch.testing.assert_close(once @ layer.weight.T, layer(x), rtol=1e-4, atol=1e-2)
        assert not torch.equal(once, x)
    assert torch.equal(once[..., 7], x[..., 7])
