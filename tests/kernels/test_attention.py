"""Attention on the CPU: the reference by hand, and every route against it in fp64."""

import logging
import math
from dataclasses import replace

import pytest
import torch

from reattend.kernels.attention import Options, attention, attention_with_lse, native, products, reference
from reattend.kernels.attention.call import read_call

# batch, query heads, key heads, queries, keys, head dim, value dim
SHAPES = [
    (1, 3, 3, 1, 1, 64, 64),
    (2, 4, 4, 63, 100, 40, 72),
    (1, 8, 1, 130, 300, 96, 80),
    (2, 3, 3, 48, 48, 128, 256),
    (1, 6, 2, 257, 513, 192, 128),
    (1, 4, 2, 50, 70, 256, 24),
    (1, 3, 1, 1000, 1000, 72, 64),
]
BATCHED = (3, 6, 2, 70, 90, 64, 64)
needs_native = pytest.mark.skipif(bool(native.unavailable()), reason=str(native.unavailable()))


def case(batch, heads, groups, queries, tokens, width, values, dtype=torch.float64):
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(batch, queries, heads, width), (batch, tokens, groups, width), (batch, tokens, groups, values)]
    # As models have them: heads behind tokens in memory.
    return [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]


def options(shape):
    """Every option once."""
    batch, heads, _, queries, tokens, *_ = shape
    ranges = torch.tensor([[min(3, tokens - 1), tokens, tokens - queries]] * batch)
    ranges[-1, 1] = max(1, tokens - 5)
    mask = torch.rand(batch, 1, queries, tokens, generator=torch.Generator().manual_seed(1)) < 0.5
    return {
        "causal": Options(),
        "all": Options(causal=False),
        "scale": Options(scale=0.31),
        "window": Options(window=17),
        "softcap": Options(softcap=2.0),
        "ranges": Options(ranges=ranges),
        "ranges, all": Options(causal=False, ranges=ranges, window=None),
        "window and ranges": Options(window=9, ranges=ranges),
        "mask": Options(causal=False, mask=mask),
        "mask for all queries": Options(causal=False, mask=mask[:, :, :1]),
        "slopes": Options(slopes=torch.linspace(0.1, 1, heads)),
        "sinks": Options(sinks=torch.linspace(-1, 6, heads)),
        "clipped": Options(gamma=torch.full((heads,), -0.02), zeta=1.03),
    }


def relative(ours, exact):
    return float((ours.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def test_by_hand():
    # Scores 0 and ln 3 at scale 1: weights 1/4 and 3/4, and a sum of 4.
    q = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    k = torch.tensor([0.0, math.log(3)], dtype=torch.float64).view(1, 1, 2, 1)
    v = torch.tensor([4.0, 8.0], dtype=torch.float64).view(1, 1, 2, 1)
    out, lse = attention_with_lse(q, k, v, Options(scale=1.0))
    assert (out.item(), lse.item()) == pytest.approx((7.0, math.log(4)))
    # A sink of score ln 4 takes half of it; gamma -1/4 and zeta 1 make weights 1/16 and 11/16.
    sink = torch.tensor([math.log(4)])
    out, lse = attention_with_lse(q, k, v, Options(scale=1.0, sinks=sink))
    assert (out.item(), lse.item()) == pytest.approx((3.5, math.log(8)))
    clipped = attention(q, k, v, Options(scale=1.0, gamma=torch.tensor([-0.25])))
    assert clipped.item() == pytest.approx(4 / 16 + 8 * 11 / 16)
    # A cap of 1 turns the scores into 0 and tanh(ln 3).
    capped = attention(q, k, v, Options(scale=1.0, softcap=1.0))
    weight = 1 / (1 + math.exp(math.tanh(math.log(3))))
    assert capped.item() == pytest.approx(4 * weight + 8 * (1 - weight))
    # With equal keys, a slope of ln 3 puts the earlier one ln 3 below: weights 1/4 and 3/4.
    slope = attention(q, k * 0, v, Options(scale=1.0, slopes=torch.tensor([math.log(3)])))
    assert slope.item() == pytest.approx(7.0)


def test_against_torch():
    for shape in SHAPES[:4]:
        q, k, v = case(*shape)
        seen = torch.ones(shape[3], shape[4], dtype=torch.bool).tril(shape[4] - shape[3])
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)
        torch.testing.assert_close(reference.attention(q, k, v, Options())[0], want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [*SHAPES, BATCHED], ids=str)
def test_the_torch_route(shape, monkeypatch):
    tensors = case(*shape)
    for name, how in options(shape).items():
        want, sums = reference.attention(*tensors, how)
        for scores in (1 << 26, 5000):  # at once, and a few queries at a time
            monkeypatch.setattr(products, "_SCORES", scores)
            out, lse = attention_with_lse(*tensors, how, backend="torch")
            torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-11, msg=name)
            torch.testing.assert_close(lse, sums, rtol=1e-9, atol=1e-11, msg=name)
            torch.testing.assert_close(
                attention(*tensors, how, backend="torch"), want, rtol=1e-9, atol=1e-11, msg=name
            )


@needs_native
@pytest.mark.parametrize("shape", [*SHAPES, BATCHED], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_compiled_route(shape, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(native, "_FEW_ROWS", 0)
    tensors = case(*shape, dtype=torch.bfloat16)
    for name, how in options(shape).items():
        if native.unfit(*tensors, how):
            assert name in ("softcap", "slopes", "clipped", "mask", "mask for all queries")
            continue
        want, sums = reference.attention(*(tensor.double() for tensor in tensors), how)
        out, lse = attention_with_lse(*tensors, how, backend="native")
        assert relative(out, want) < 4e-3, name
        torch.testing.assert_close(lse.double(), sums, rtol=1e-5, atol=2e-5, msg=name)


@needs_native
def test_the_compiled_route_takes_any_strides():
    q, k, v = (tensor.contiguous() for tensor in case(*BATCHED, dtype=torch.bfloat16))
    want = attention(q, k, v, backend="native")
    wide = torch.randn(3, 2, 90, 64, 2).bfloat16()
    wide[..., 0] = k
    assert torch.equal(
        attention(q, wide[..., 0], v.transpose(2, 3).contiguous().transpose(2, 3), backend="native"), want
    )


@needs_native
def test_nothing_outside_of_the_ranges_is_read():
    shape = (2, 3, 3, 60, 80, 64, 64)
    q, k, v = case(*shape, dtype=torch.bfloat16)
    ranges = torch.tensor([[7, 80, 20], [0, 71, 11]])
    want = attention(q, k, v, Options(ranges=ranges), backend="native")
    for bad in (torch.nan, torch.inf):
        for tensor in (k, v):
            tensor[0, :, :7], tensor[1, :, 71:] = bad, bad
        assert torch.equal(attention(q, k, v, Options(ranges=ranges), backend="native"), want)


EMPTY = [
    Options(ranges=torch.tensor([[5, 5, 0]])),
    Options(ranges=torch.tensor([[60, 60, 0]])),
    Options(ranges=torch.tensor([[50, 60, -60]])),
]


@pytest.mark.parametrize("how", EMPTY, ids=["no keys", "behind the end", "all in the future"])
@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_native)])
def test_a_query_that_sees_nothing_puts_out_zero(how, backend):
    tensors = case(1, 2, 1, 50, 60, 64, 64, dtype=torch.bfloat16)
    out, lse = attention_with_lse(*tensors, how, backend=backend)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))
    assert torch.equal(attention(*tensors, how, backend=backend), out)


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_native)])
def test_a_row_with_one_key_is_its_value(backend):
    q, k, v = case(1, 2, 2, 50, 60, 64, 64, dtype=torch.bfloat16)
    out = attention(q, k, v, Options(causal=False, ranges=torch.tensor([[41, 42, 0]])), backend=backend)
    assert torch.equal(out, v[:, :, 41:42].expand_as(out))


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_native)])
def test_chunks_of_queries_are_the_whole(backend):
    """More keys than queries: causal from the bottom right (upstream kernels start from the top left)."""
    q, k, v = case(1, 4, 2, 200, 200, 64, 64, dtype=torch.bfloat16)
    whole = attention(q, k, v, backend=backend)
    parts = [
        attention(q[:, :, a:b], k[:, :, :b], v[:, :, :b], backend=backend)
        for a, b in ((0, 64), (64, 137), (137, 200))
    ]
    assert relative(torch.cat(parts, 2), whole.double()) < 4e-3


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_native)])
def test_padded_rows_are_single_runs(backend):
    q, k, v = case(3, 6, 2, 90, 90, 64, 64, dtype=torch.bfloat16)
    ranges = torch.tensor([[0, 90, 0], [31, 90, 0], [0, 77, 0]])
    out = attention(q, k, v, Options(ranges=ranges), backend=backend)
    for i, (first, end) in enumerate(((0, 90), (31, 90), (0, 77))):
        alone = attention(*(tensor[i : i + 1, :, first:end] for tensor in (q, k, v)), backend=backend)
        assert relative(out[i : i + 1, :, first:end], alone.double()) < 4e-3


def test_gradients_take_the_torch_route():
    q, k, v = case(1, 4, 2, 60, 60, 64, 64, dtype=torch.bfloat16)
    q.requires_grad_()
    attention(q, k, v).float().sum().backward()
    assert q.grad is not None
    with pytest.raises(RuntimeError, match="no gradients"):
        attention(q, k, v, backend="native")


WRONG = [
    (Options(window=0), "window 0"),
    (Options(causal=False, window=3), "needs causal"),
    (Options(softcap=0.0), "softcap"),
    (Options(ranges=torch.zeros(2, 3)), r"ranges \(2, 3\)"),
    (Options(slopes=torch.ones(3)), r"slopes \(3,\)"),
    (Options(gamma=torch.ones(4), sinks=torch.ones(4)), "clipped softmax with sinks"),
    (Options(zeta=0.9), "zeta 0.9 is less than 1"),
    (Options(zeta=math.nan), "zeta nan is less than 1"),
    (Options(gamma=torch.tensor([-0.1, 0.0, 0.25, -0.1])), "gamma is up to 0.25, and must not be positive"),
    (Options(mask=torch.ones(1, 1, 5, 6)), "mask torch.float32"),
    (Options(mask=torch.ones(1, 1, 4, 6, dtype=torch.bool)), "mask torch.bool"),
    (Options(sinks=torch.ones(4, device="meta")), "sinks is on meta"),
]


@pytest.mark.parametrize(("how", "message"), WRONG, ids=[message for _, message in WRONG])
def test_options_that_do_not_fit(how, message):
    with pytest.raises(ValueError, match=message):
        attention(*case(1, 4, 2, 5, 6, 8, 8), how)


def test_shapes_that_do_not_fit():
    q, k, v = case(1, 4, 2, 5, 6, 8, 8)
    for tensors, message in (
        ((q, k[..., :7], v), "do not fit"), ((q[:, :3], k, v), "no multiple"), ((q.float(), k, v), "one dtype"),
        ((q[0], k, v), "4 dimensions"), ((q, k, v[:, :, :5]), "do not fit"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            attention(*tensors)
    with pytest.raises(ValueError, match="backend='cuda'"):
        attention(q, k, v, backend="cuda")
    with pytest.raises(RuntimeError, match=r"backend 'native' can't run: tensors are torch\.float64"):
        attention(q, k, v, backend="native")


def test_no_keys_and_no_queries():
    q, k, v = case(1, 4, 2, 5, 6, 8, 8)
    assert torch.equal(attention(q, k[:, :, :0], v[:, :, :0]), torch.zeros(1, 4, 5, 8, dtype=torch.float64))
    assert attention(q[:, :, :0], k, v).shape == (1, 4, 0, 8)
    for name, how in options((1, 4, 2, 5, 6)).items():
        how = replace(how, ranges=None, mask=None)
        out, lse = attention_with_lse(q, k[:, :, :0], v[:, :, :0], how)
        assert torch.equal(out, torch.zeros_like(out)), name
        assert torch.equal(
            lse,
            torch.full_like(lse, -torch.inf) if how.sinks is None else how.sinks.double()[:, None].expand(1, 4, 5),
        )


def test_calls_of_transformers(caplog):
    ranges = torch.tensor([[1, 5, 2]], dtype=torch.int32)
    assert read_call(None, 0.5, True, {"sliding_window": 3, "softcap": 2.0}) == Options(True, 0.5, softcap=2.0)
    read = read_call(torch.tensor([[[[1, 5, 2, 3]]]], dtype=torch.int32), None, False, {"sliding_window": 9})
    assert read == Options(True, window=3)
    assert torch.equal(read.ranges, ranges)
    seen = torch.ones(1, 1, 2, 3, dtype=torch.bool)
    read = read_call(seen, None, True, {"sliding_window": 1, "position_ids": 3})
    assert read == Options(False)
    assert read.mask is seen
    with pytest.raises(ValueError, match="position_bias"):
        read_call(None, None, True, {"position_bias": seen})
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            read_call(None, None, True, {"strange": 1})
    assert [record.message for record in caplog.records] == ["attention 'reattend' takes no notice of 'strange'"]
