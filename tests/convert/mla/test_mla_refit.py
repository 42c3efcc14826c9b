"""Refit: it lowers the error, changes no function when balancing, and refuses to go on with a loss that is no number."""

from dataclasses import replace

import pytest
import torch
from test_mla_closed_form import moments_of, rope_of
from test_mla_exact import random_source

from reattend.convert.mla.attention import compose, output_error
from reattend.convert.mla.causal import causal_attention
from reattend.convert.mla.closed_form import Choice, convert_layer
from reattend.convert.mla.refit import Schedule, balance_latent, refit
from reattend.convert.mla.rope import Rotary, default_frequencies


@pytest.fixture(scope="module")
def case():
    source = random_source(6, 3, 10, Rotary(default_frequencies(1e4, 10)), biased=True, hidden=24)
    x = torch.randn(8, 24, 24, dtype=torch.float64)
    moments = moments_of(source, x)
    return source, compose(source, convert_layer(moments, source.o_EHD, rope_of(source, moments, 6), 16, Choice()))


def test_balancing_keeps_the_function_and_evens_the_channels(case):
    _, layer = case
    even = balance_latent(layer)
    x = torch.randn(1, 9, 24, dtype=torch.float64)
    torch.testing.assert_close(even.attend(x), layer.attend(x), rtol=1e-9, atol=1e-9)
    write = even.down_CE[:16].square().mean(1)
    read = torch.cat([even.key_HNL, even.value_HVL], 1).flatten(0, 1).square().mean(0)
    torch.testing.assert_close(write, read)


def test_refit_lowers_the_error_on_fresh_inputs(case):
    source, layer = case
    worse = replace(layer, value_HVL=layer.value_HVL * 0.7)  # the closed form leaves little to gain here
    source, layer = (
        type(y)(**{k: v.float() if isinstance(v, torch.Tensor) else v for k, v in vars(y).items()})
        for y in (source, worse)
    )

    def batch(step):
        torch.manual_seed(100 + step)
        x = torch.randn(4, 24, 24)
        return x, source.attend(x)

    fresh, want = batch(10_000)
    fitted, losses = refit(layer, batch, Schedule(steps=60, rate=3e-3))
    before, after = (float(output_error(y.attend(fresh), want)) for y in (layer, fitted))
    assert after < 0.9 * before
    assert losses[0] == pytest.approx(before, rel=0.3)
    assert sum(losses[-10:]) < 0.97 * sum(losses[:10])
    assert all(not value.requires_grad for value in fitted.tensors().values())
    assert torch.equal(layer.rotary.frequency_F, fitted.rotary.frequency_F)


def test_a_loss_that_is_no_number_is_an_error(case):
    _, layer = case
    bad = torch.full((1, 5, 24), torch.nan)
    with pytest.raises(FloatingPointError, match="step 0"):
        refit(layer, lambda step: (bad, bad), Schedule(steps=2))


def test_output_error_is_per_token_and_normalised():
    source = torch.tensor([[[100.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    ours = source + torch.tensor([[[10.0, 0.0], [0.1, 0.0], [0.1, 0.0]]])
    # Squares 100, 0.01, 0.01 over 10^4, 1, 1, each with a tenth of the median (1) added.
    assert float(output_error(ours, source)) == pytest.approx((100 / 10000.1 + 0.01 / 1.1 + 0.01 / 1.1) / 3)
    assert float(output_error(ours, source, floor=0.0)) == pytest.approx(0.01)


def test_the_rate_rises_then_falls_to_zero():
    schedule = Schedule(steps=10, rate=1.0, warmup=4)
    rates = [schedule.rate_at(step) for step in range(11)]
    assert rates[0] == pytest.approx(0.25)
    assert rates[:4] == sorted(rates[:4])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[10] == pytest.approx(0)


@pytest.mark.parametrize("tokens", [5, 128, 300])
def test_the_attention_of_the_refit_and_its_gradient_are_those_of_torch(tokens):
    torch.manual_seed(tokens)
    shapes = ((2, 3, tokens, 12), (2, 3, tokens, 12), (2, 3, tokens, 8))
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    read = torch.randn(2, 3, tokens, 8, dtype=torch.float64)
    ours = causal_attention(q, k, v, 0.3)
    later = torch.full((tokens, tokens), -torch.inf, dtype=torch.float64).triu(1)
    plain = (q @ k.mT * 0.3 + later).softmax(-1) @ v
    with torch.no_grad():
        torch.testing.assert_close(causal_attention(q, k, v, 0.3), plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    want = torch.autograd.grad((plain * read).sum(), (q, k, v))
    for found, wanted in zip(torch.autograd.grad((ours * read).sum(), (q, k, v)), want, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
