"""Quantised attention at its edges: keys that no query sees, odd shapes and numbers, and which route runs.

Tests named `test_upstream_...` hold what was reported against SageAttention (by issue number), or read in its source.
"""

import logging

import pytest
import torch
from interpreter import run_in_interpreter
from test_attention_int8 import HOWS, INT8, PLAIN, alike, case, distances, every_how, exact, ours, relative

from reattend.kernels import attention_int8 as package
from reattend.kernels.attention import Options, attention
from reattend.kernels.attention_int8 import Quantization, attention_int8, attention_int8_with_lse


def padded(x, left, right, garbage):
    filler = torch.full((*x.shape[:2], 1, x.shape[3]), garbage, dtype=x.dtype)
    return torch.cat([filler.expand(-1, -1, left, -1), x, filler.expand(-1, -1, right, -1)], 2)


@every_how
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e4])
def test_upstream_padding_reaches_no_mean_and_no_scale(how, garbage):
    singles = [case(queries=n, tokens=n, bias=8.0) for n in (90, 130, 7)]
    room = [(50, 0), (0, 10), (100, 33)]
    rows = [
        [padded(query, *sides, 0.5), padded(key, *sides, garbage), padded(value, *sides, garbage)]
        for (query, key, value), sides in zip(singles, room, strict=True)
    ]
    tensors = [torch.cat(column) for column in zip(*rows, strict=True)]
    ranges = torch.tensor([[left, left + len(x[0][0, 0]), 0] for x, (left, _) in zip(singles, room, strict=True)])
    output, lse = ours(tensors, Options(ranges=ranges), how)
    for i, (single, (left, _)) in enumerate(zip(singles, room, strict=True)):
        want, want_lse = ours(single, PLAIN, how)
        end = left + want.shape[2]
        assert alike(output[i, :, left:end], want[0])
        assert alike(lse[i, :, left:end], want_lse[0])


@pytest.mark.parametrize("options", [Options(), Options(causal=False), Options(window=9)])
@every_how
def test_keys_around_the_range_change_nothing(options, how):
    query, key, value = case(queries=40, tokens=100, bias=8.0)
    want = ours((query, key, value), options, how)
    ranges = torch.tensor([[20, 120, 120 - 40]])
    around = Options(options.causal, window=options.window, ranges=ranges)
    got = ours((query, padded(key, 20, 30, torch.nan), padded(value, 20, 30, torch.nan)), around, how)
    assert all(alike(*pair) for pair in zip(got, want, strict=True))


def test_keys_behind_the_last_query_change_nothing():
    query, key, value = case(queries=30, tokens=80, bias=8.0)
    want, _ = ours((query, key, value))
    ranges = torch.tensor([[0, 200, 50]])  # a cache with room: its end lies behind the last query's position
    got, _ = ours((query, padded(key, 0, 120, 1e4), padded(value, 0, 120, torch.inf)), Options(ranges=ranges))
    assert alike(got, want)


def test_upstream_means_are_each_sequence_s_own():
    """Upstream's packed sequences share one mean (core.py, varlen)."""
    one, two = case(queries=80, tokens=80, bias=8.0), case(queries=64, tokens=64, bias=8.0)
    short = [padded(x, 0, 16, 0.0) for x in two]
    both = [torch.cat(pair) for pair in zip(one, short, strict=True)]
    output, _ = ours(both, Options(ranges=torch.tensor([[0, 80, 0], [0, 64, 0]])))
    for got, single in ((output[:1], one), (output[1:, :, :64], two)):
        cosine, l1 = distances(got, exact(single, Options())[0])
        assert cosine >= INT8[0]
        assert l1 <= INT8[1]


@every_how
def test_upstream_rows_without_keys_are_zero(how):
    """Upstream returns the mean of V, or NaN with a float mask."""
    tensors = case(batch=3, queries=20, tokens=30, bias=8.0)
    ranges = torch.tensor([[10, 30, 5], [4, 4, 0], [0, 30, -8]])
    output, lse = ours(tensors, Options(ranges=ranges), how)
    for row, count in enumerate((5, 20, 8)):
        assert not output[row, :, :count].any()
        assert (lse[row, :, :count] == -torch.inf).all()
        assert lse[row, :, count:].isfinite().all()
        assert output[row, :, count:].any(-1).all()


@every_how
def test_upstream_blocks_of_zeros_give_no_nan(how):
    """Upstream divides 0 by 0 (Triton, per block)."""
    query, key, value = case(queries=130, tokens=200)
    key[:, :, 64:128] = 0
    query[:, :, :3] = 0
    got, lse = ours((query, key, value), PLAIN, how)
    want, want_lse = exact((query, key, value), Options())
    assert relative(got, want) < (0.35 if how.bits == 4 else 0.06)
    assert (lse[:, :, :3] - want_lse[:, :, :3]).abs().max() < (0.01 if how.smooth_q else 1e-5)
    for zeros in (torch.zeros_like(key), torch.full_like(key, 1e-38)):
        got, lse = ours((query, zeros, torch.zeros_like(value)), PLAIN, how)
        assert not got.any()
        assert lse.isfinite().all()


@pytest.mark.parametrize("tokens", [64, 65, 127, 129])
def test_upstream_tails_of_one_token(tokens):
    """Upstream's tail loads have no default, and its log-sum-exp assumes whole tiles."""
    tensors = case(queries=tokens, tokens=tokens, bias=8.0)
    (output, lse), (want, want_lse) = ours(tensors), exact(tensors, Options())
    assert relative(output, want) < 0.03
    assert (lse - want_lse).abs().max() < 0.05


def test_nan_in_a_key_that_is_seen_is_not_hidden():
    query, key, value = case(queries=20, tokens=20)
    key[0, 0, 3, 5] = torch.nan
    output, _ = ours((query, key, value))
    assert output[0, 0, 3:].isnan().all()
    assert output[0, 1].isfinite().all()


# ---- shapes and types


@pytest.mark.parametrize(("queries", "tokens"), [(1, 90), (2, 300), (50, 130), (130, 50)])
def test_upstream_26_131_causal_is_aligned_at_the_last_key(queries, tokens):
    tensors = case(queries=queries, tokens=tokens, bias=8.0)
    (output, lse), (want, want_lse) = ours(tensors), exact(tensors, Options())
    assert relative(output, want) < 0.03
    assert torch.equal(lse.isinf(), want_lse.isinf())


@every_how
def test_queries_in_chunks_are_queries_at_once(how):
    query, key, value = case(queries=300, tokens=300, bias=8.0)
    whole, _ = ours((query, key, value), PLAIN, how)
    part, _ = ours((query[:, :, 128:], key, value), PLAIN, how)
    assert alike(part, whole[:, :, 128:])


@every_how
@pytest.mark.parametrize("per_group", [1, 3, 8])
def test_upstream_302_grouped_heads_equal_repeated_ones(how, per_group):
    query, key, value = case(heads=2 * per_group, queries=50, tokens=70, bias=8.0, dtype=torch.bfloat16)
    grouped = ours((query, key, value), PLAIN, how)
    repeated = ours((query, *(x.repeat_interleave(per_group, 1) for x in (key, value))), PLAIN, how)
    for one, other in zip(grouped, repeated, strict=True):
        torch.testing.assert_close(one, other, atol=1e-2 if one.dtype == torch.bfloat16 else 1e-4, rtol=1e-2)


@every_how
def test_a_single_key_gives_its_value(how):
    tensors = case(queries=5, tokens=1, dtype=torch.float16)
    output, _ = ours(tensors, Options(causal=False), how)
    want = tensors[2].expand_as(output)
    assert torch.equal(output, want)


def test_upstream_93_large_values_do_not_overflow():
    """Upstream sums in fp16, and casts bf16 values to it."""
    query, key, value = case(queries=50, tokens=600)
    half = [query.half(), key.half(), (value.abs() * 1e4).half().clamp(max=6e4)]
    assert relative(ours(half)[0], exact(half, Options())[0]) < 0.02
    wide = [query.bfloat16(), key.bfloat16(), (value * 1e6).bfloat16()]
    output, _ = ours(wide)
    assert output.dtype == torch.bfloat16
    assert relative(output, exact(wide, Options())[0]) < 0.03


@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mask", Options(causal=False, mask=torch.ones(1, 1, 9, 9, dtype=torch.bool))),
        ("slopes", Options(slopes=torch.ones(2))),
        ("softcap", Options(softcap=30.0)),
        ("gamma", Options(gamma=torch.zeros(2))),
        ("zeta", Options(zeta=1.1)),
    ],
)
def test_upstream_127_options_are_never_swallowed(name, options, backend):
    with pytest.raises(ValueError, match=name):
        attention_int8(*case(queries=9, tokens=9), options, backend=backend)


def test_what_does_not_fit_is_refused():
    query, key, value = case(queries=9, tokens=9)
    with pytest.raises(ValueError, match="backend='torch'"):
        attention_int8(query, key, value, backend="torch")
    with pytest.raises(ValueError, match="float64"):
        attention_int8(query.double(), key.double(), value.double())
    with pytest.raises(ValueError, match="do not fit"):
        attention_int8(query, key[..., :32], value)
    with pytest.raises(RuntimeError, match="tensors are on cpu"):
        attention_int8(query, key, value, backend="triton")
    with pytest.raises(RuntimeError, match="simulated"):
        attention_int8(query, key, value, how=Quantization(bits=4), backend="triton")
    wide = [x.repeat(1, 1, 1, 5) for x in (query, key, value)]
    with pytest.raises(RuntimeError, match="wider than 256"):
        attention_int8(*wide, backend="triton")
    many = [torch.zeros(1, 1, 1, 1).expand(65536, -1, -1, -1)] * 3
    with pytest.raises(RuntimeError, match="more than 65535 sequences"):
        attention_int8(*many, backend="triton")


def test_on_a_cpu_exact_attention_does_the_work_and_the_log_says_so_once(caplog):
    package._log_once.cache_clear()
    tensors = case(queries=600, tokens=600)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            output, lse = attention_int8_with_lse(*tensors)
            assert torch.equal(attention_int8(*tensors), attention(*tensors))
    assert relative(output, exact(tensors, Options())[0]) < 1e-5
    assert (lse - exact(tensors, Options())[1]).abs().max() < 1e-5
    assert [record.message for record in caplog.records] == [
        "attention_int8: exact attention on a CPU, where 8 bits gain nothing"
    ]


def test_a_simulation_runs_on_the_cpu():
    tensors, how = case(queries=60, tokens=60), Quantization(bits=4, smooth_q=True)
    assert torch.equal(attention_int8(*tensors, how=how), ours(tensors, how=how)[0])


@pytest.mark.parametrize(("queries", "tokens", "exactly"), [(1, 4096, True), (64, 511, True), (64, 512, False)])
def test_upstream_70_343_short_calls_are_exact(queries, tokens, exactly, monkeypatch):
    tensors = [torch.empty(1, 2, n, 64, device="meta") for n in (queries, tokens, tokens)]
    monkeypatch.setattr(package, "_unfit", lambda *_: None)
    assert package._prefers_exact(*tensors, Quantization(), gradients=False) is exactly


def test_upstream_90_gradients_are_refused_or_exact():
    tensors = [x.requires_grad_() for x in case(queries=9, tokens=9)]
    for backend, how in (("reference", HOWS["block"]), ("triton", HOWS["block"]), ("auto", HOWS["4 bits"])):
        with pytest.raises(RuntimeError, match="gradients"):
            attention_int8(*tensors, how=how, backend=backend)
    attention_int8(*tensors).sum().backward()
    assert all(x.grad.any() for x in tensors)
    with torch.no_grad():
        assert not ours(tensors)[0].requires_grad


def test_nothing_to_do():
    query, key, value = case(queries=9, tokens=9)
    output, lse = ours((query, key[:, :, :0], value[:, :, :0]))
    assert not output.any()
    assert (lse == -torch.inf).all()
    assert ours((query[:, :, :0], key, value))[0].shape == (1, 2, 0, 64)
    assert torch.equal(
        ours((query, key[:, :, :0], value[:, :, :0]), Options(sinks=torch.ones(2)))[1], torch.ones_like(lse)
    )


def test_every_kernel_in_the_interpreter():
    pytest.importorskip("triton")
    printed = run_in_interpreter("attention_int8_triton_cases.py")
    assert "36 cases" in printed
