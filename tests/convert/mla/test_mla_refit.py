"""Refit: it lowers the error, changes no function when balancing, and refuses to go on with a loss that is no number."""

from dataclasses import replace

import pytest
import torch
from test_mla_closed_form import moments_of, rope_of
from test_mla_exact import random_source

from reattend.calibration.fitting import Schedule, output_error
from reattend.calibration.orthogonal import orthogonal
from reattend.convert.mla.attention import compose
from reattend.convert.mla.balance import balance
from reattend.convert.mla.causal import causal_attention
from reattend.convert.mla.closed_form import Choice, convert_layer
from reattend.convert.mla.refit import fit_output, refit
from reattend.convert.mla.rope import Rotary, default_frequencies


@pytest.fixture(scope="module")
def case():
    source = random_source(6, 3, 10, Rotary(default_frequencies(1e4, 10)), biased=True, hidden=24)
    x = torch.randn(8, 24, 24, dtype=torch.float64)
    moments = moments_of(source, x)
    return source, compose(source, convert_layer(moments, source.o_EHD, rope_of(source, moments, 6), 16, Choice()))


def test_balancing_keeps_the_function_and_evens_the_channels(case):
    _, layer = case
    even = balance(layer)
    x = torch.randn(1, 9, 24, dtype=torch.float64)
    torch.testing.assert_close(even.attend(x), layer.attend(x), rtol=1e-9, atol=1e-9)
    write = even.down_CE[:16].square().mean(1)
    read = torch.cat([even.key_HNL, even.value_HVL], 1).flatten(0, 1).square().mean(0)
    torch.testing.assert_close(write, read)
    written = even.down_CE[16:].square().mean(1).view(-1, 2).mean(1)
    read = even.query_HQE[:, even.key_HNL.shape[1] :].square().mean((0, 2)).view(-1, 2).mean(1)
    torch.testing.assert_close(written, read)


def spoiled(case):
    """The source and its conversion with other values, fp32: the closed form leaves little to gain here."""
    source, layer = case
    torch.manual_seed(1)
    worse = replace(layer, value_HVL=layer.value_HVL * 0.7 + 0.05 * torch.randn_like(layer.value_HVL))
    return (
        type(y)(**{k: v.float() if isinstance(v, torch.Tensor) else v for k, v in vars(y).items()})
        for y in (source, worse)
    )


def test_refit_lowers_the_error_on_fresh_inputs(case):
    source, layer = spoiled(case)
    torch.manual_seed(2)
    x, fresh = torch.randn(80, 24, 24), torch.randn(4, 24, 24)
    fitted, losses = refit(layer, x, source.attend(x), Schedule(steps=40, rate=1e-2, windows=4))
    before, solved, after = (
        float(output_error(y.attend(fresh), source.attend(fresh)))
        for y in (layer, fit_output(layer, x, source.attend(x)), fitted)
    )
    assert solved < 0.9 * before
    assert after < 0.9 * solved
    assert len(losses) == 40
    assert all(not value.requires_grad for value in fitted.tensors().values())
    assert torch.equal(layer.rotary.frequency_F, fitted.rotary.frequency_F)


@pytest.mark.parametrize("biased", [True, False])
def test_the_solved_output_is_the_ridge_regression_of_a_dense_solver(case, biased):
    source, layer = spoiled(case)
    layer = layer if biased else replace(layer, output_bias_E=None)
    torch.manual_seed(3)
    x = torch.randn(3, 24, 24)
    target, read = source.attend(x), layer.mix(x).transpose(1, 2).flatten(2).flatten(0, 1).double()
    read = torch.cat([read, torch.ones(len(read), 1)], 1) if biased else read
    size = target.square().sum(-1)
    root = (size + 0.1 * size.flatten(1).median(1).values[:, None]).rsqrt().flatten()[:, None].double()
    ridge = (0.1 * (root * read).square().sum(0).mean()).sqrt()
    missing = (target - layer.attend(x)).flatten(0, 1).double()
    rows = torch.cat([root * read, ridge * torch.eye(read.shape[1])])
    change = torch.linalg.lstsq(rows, torch.cat([root * missing, torch.zeros(read.shape[1], 24)])).solution
    solved = fit_output(layer, x, target)
    width = layer.output_EHV.flatten(1).shape[1]
    moved = (solved.output_EHV - layer.output_EHV).flatten(1).T
    torch.testing.assert_close(moved, change[:width].float(), rtol=1e-3, atol=1e-4)
    if biased:
        torch.testing.assert_close(
            solved.output_bias_E - layer.output_bias_E, change[-1].float(), rtol=1e-3, atol=1e-4
        )
    else:
        assert solved.output_bias_E is None


@pytest.mark.parametrize("shape", [(3, 8, 20), (20, 8)])
def test_an_orthogonal_step_keeps_singular_vectors_and_evens_singular_values(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    found = u.mT @ orthogonal(matrix) @ vh.mT
    value = found.diagonal(dim1=-2, dim2=-1)
    assert value.min() > 0.5  # the published coefficients settle around 1, not at it
    assert value.max() < 1.3
    torch.testing.assert_close(found, torch.diag_embed(value), rtol=0, atol=1e-9)


def test_a_loss_that_is_no_number_is_an_error(case):
    _, layer = case
    bad = torch.full((1, 5, 24), torch.nan)
    with pytest.raises(FloatingPointError, match="NaN"):
        refit(layer, bad, bad, Schedule(steps=2))


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
