"""q/k norms and windows in the mathematics: against a reference token by token, written here."""

from dataclasses import replace

import pytest
import torch
from test_mla_closed_form import rope_of
from test_mla_exact import ROPES, random_source
from test_mla_refit import spoiled

from reattend.calibration.fitting import Schedule, output_error
from reattend.convert.mla.attention import compose
from reattend.convert.mla.causal import causal_attention
from reattend.convert.mla.closed_form import Choice, convert_layer
from reattend.convert.mla.exact import same_cache
from reattend.convert.mla.prefix import read_attention, stored_attention
from reattend.convert.mla.refit import refit
from reattend.convert.mla.rope import read_rotary
from reattend.convert.mla.statistics import MomentAccumulator

F64 = torch.float64
WINDOW = 7


def normed_source(rope="default", window=None, **sizes):
    source = random_source(6, 3, 10, read_rotary(ROPES[rope], 10, 64), **{"biased": True, "hidden": 24, **sizes})
    torch.manual_seed(5)
    weights = torch.rand(2, 10, dtype=F64) + 0.5
    return replace(source, q_norm_D=weights[0], k_norm_D=weights[1], norm_eps=0.1, window=window)


def heads_of(source, x):
    """(T, heads, D) of queries, keys and values, number by number where norms are concerned."""
    q, k, v = (
        torch.einsum("te,hde->thd", x, weight) + bias
        for weight, bias in (
            (source.q_HDE, source.q_bias_HD), (source.k_GDE, source.k_bias_GD), (source.v_GDE, source.v_bias_GD),
        )
    )  # fmt: skip
    for y, weight in ((q, source.q_norm_D), (k, source.k_norm_D)):
        for row in y.flatten(0, 1):
            row.div_((sum(float(n) ** 2 for n in row) / len(row) + source.norm_eps) ** 0.5).mul_(weight)
    return q, k, v


def weights_of(source, q, k):
    """Softmax weights (H, T, T): what a window hides gets none."""
    tokens, half = len(q), q.shape[-1] // 2
    frequency = source.rotary.at_length(tokens)
    turn = torch.polar(torch.ones(tokens, half, dtype=F64), torch.arange(tokens, dtype=F64)[:, None] * frequency)
    weights = torch.zeros(q.shape[1], tokens, tokens, dtype=F64)
    for h in range(q.shape[1]):
        g = h // (q.shape[1] // k.shape[1])
        qc, kc = (torch.complex(y[:, :half], y[:, half:]) * turn for y in (q[:, h], k[:, g]))
        for t in range(tokens):
            first = max(0, t + 1 - (source.window or tokens))
            score = (qc[t].conj() * kc[first : t + 1]).sum(1).real * source.scale * source.rotary.factor**2
            weights[h, t, first : t + 1] = torch.softmax(score, 0)
    return weights


def reference(source, x):
    q, k, v = heads_of(source, x)
    found = torch.einsum("hts,shd->thd", weights_of(source, q, k), v.repeat_interleave(2, 1))
    return torch.einsum("thd,ehd->te", found, source.o_EHD) + source.o_bias_E


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("rope", ["default", "yarn", "longrope"])
def test_same_cache_is_the_same_function_behind_norms(rope, window):
    source = normed_source(rope, window)
    ours = compose(source, same_cache(6, 3, 10))
    x = torch.randn(19, 24, dtype=F64)
    want = reference(source, x)
    torch.testing.assert_close(source.attend(x[None])[0], want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.attend(x[None])[0], want, rtol=1e-9, atol=1e-9)
    again = read_attention(stored_attention(ours), source, same_cache(6, 3, 10).pair_P)
    torch.testing.assert_close(again.attend(x[None].float())[0].double(), want, rtol=1e-4, atol=1e-4)


def moments_of(source, sequences):
    accumulator = MomentAccumulator(6, 3, source.rotary, 40, source.scale, source.window)
    for x in sequences:
        accumulator.add(*(y[0] for y in source.project(x[None])))
    return accumulator.result()


def test_moments_are_taken_behind_norms_and_within_the_window():
    source = normed_source(window=WINDOW)
    x = torch.randn(2, 19, 24, dtype=F64)
    got = moments_of(source, x)
    plain, attended = torch.zeros(60, 60, dtype=F64), torch.zeros(60, 60, dtype=F64)
    distance, query = torch.zeros(WINDOW, dtype=F64), torch.zeros(6, 10, 10, dtype=F64)
    for sequence in x:
        q, k, v = heads_of(source, sequence)
        z = torch.cat([k.flatten(1), v.flatten(1)], 1)
        weights = weights_of(source, q, k)
        plain += z.T @ z / 38
        query += torch.einsum("thd,the->hde", q, q) / 38
        attended += torch.einsum("hts,si,sj->ij", weights, z, z) / 6 / 38
        for lag in range(WINDOW):
            distance[lag] += weights.diagonal(-lag, 1, 2).sum()
    torch.testing.assert_close(got.plain.second_ZZ, plain)
    torch.testing.assert_close(got.attended.second_ZZ, attended)
    torch.testing.assert_close(got.query_HDD, query)
    torch.testing.assert_close(got.distance_T, distance / distance.sum())


@pytest.mark.parametrize("window", [None, WINDOW])
def test_the_error_falls_with_the_rank_and_the_refit_lowers_it(window):
    source = normed_source(window=window)
    torch.manual_seed(6)
    x = torch.randn(8, 24, 24, dtype=F64)
    moments, target = moments_of(source, x), source.attend(x)
    errors = []
    for rank in (4, 16, 32, 48):
        maps = convert_layer(moments, source.o_EHD, rope_of(source, moments, 6), rank, Choice())
        errors.append(float(output_error(compose(source, maps).attend(x), target)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2 * errors[0]
    maps = convert_layer(moments, source.o_EHD, rope_of(source, moments, 6), 16, Choice())
    source32, worse = spoiled((source, compose(source, maps)))
    worse = worse.to(torch.float32)
    fresh, x = torch.randn(4, 24, 24), torch.randn(80, 24, 24)
    fitted, _ = refit(worse, x, source32.attend(x), Schedule(steps=40, rate=1e-2, windows=4))
    before, after = (float(output_error(y.attend(fresh), source32.attend(fresh))) for y in (worse, fitted))
    assert after < 0.8 * before
    assert torch.equal(fitted.inputs.k_GDE, source32.k_GDE)  # the maps are fitted, not what they read
    assert fitted.window == window


def test_a_window_hides_what_a_mask_does_and_passes_gradients():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 11, 6, dtype=F64, requires_grad=True) for _ in range(3))
    lag = torch.arange(11)[:, None] - torch.arange(11)
    score = (q @ k.transpose(-1, -2) * 0.3).masked_fill((lag < 0) | (lag >= 4), -torch.inf)
    torch.testing.assert_close(causal_attention(q, k, v, 0.3, 4), score.softmax(-1) @ v)
    torch.testing.assert_close(causal_attention(q, k, v, 0.3, 11), causal_attention(q, k, v, 0.3))
    assert torch.autograd.gradcheck(lambda *a: causal_attention(*a, 0.3, 4), (q, k, v))
