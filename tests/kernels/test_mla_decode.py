"""Absorbed MLA decode against its reference."""

import pytest
import torch
from interpreter import run_in_interpreter

from reattend.kernels.mla_decode import mla_decode, native, reference

SHAPES = [(1, 3, 1, 7, 5, 2), (2, 4, 1, 40, 16, 8), (2, 3, 4, 33, 12, 6), (1, 1, 2, 2, 1, 2)]


def case(batch, heads, queries, tokens, rank, rope, dtype=torch.float64, room=0):
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(batch, heads, queries, rank), (batch, heads, queries, rope)]
    rows = [(batch, tokens + room, rank), (batch, tokens + room, rope)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes + rows]
    return [*tensors[:2], *(tensor[:, :tokens] for tensor in tensors[2:])]


def causal(queries, tokens):
    return torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)[None, None]


def test_by_hand():
    # One head, scores 0 and ln 3: weights 1/4 and 3/4.
    rows = torch.tensor([[[0.0, 4.0], [2.0, 8.0]]])
    rope = torch.tensor([[[0.0], [1.0]]])
    query = torch.tensor([[[[0.0, 0.0]]]]), torch.tensor([[[[2 * torch.log(torch.tensor(3.0))]]]])
    assert mla_decode(*query, rows, rope, scale=0.5).flatten().tolist() == pytest.approx([1.5, 7.0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("masked", ["no", "bool", "numbers"])
def test_it_is_the_reference(shape, masked):
    mask = None if masked == "no" else causal(shape[2], shape[3])
    if masked == "numbers":
        mask = torch.zeros_like(mask, dtype=torch.float64).masked_fill(~mask, -1e9)
    tensors = case(*shape, room=3)  # rows are the start of a larger buffer
    want = reference.mla_decode(*tensors, scale=0.3, mask=mask)
    torch.testing.assert_close(mla_decode(*tensors, scale=0.3, mask=mask), want, rtol=1e-12, atol=1e-12)


# Tokens in one tile, in several, at a tile's edge; padded rows; a part for each of two threads.
WIDE_SHAPES = [(1, 9, 1, 300, 128, 64), (2, 4, 3, 64, 32, 8), (1, 1, 1, 1, 32, 8), (2, 5, 2, 517, 96, 16)]
needs_native = pytest.mark.skipif(bool(native.unavailable()), reason="no native")


@needs_native
@pytest.mark.parametrize("shape", WIDE_SHAPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_the_compiled_route(shape, threads, masked, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    mask = causal(shape[2], shape[3]).expand(shape[0], -1, -1, -1).clone() if masked else None
    if masked and shape[3] > 9:
        mask[0, :, :, 2:9] = False
    tensors = case(*shape, dtype=torch.float32, room=3)
    want = reference.mla_decode(*(t.double() for t in tensors), scale=0.3, mask=mask)
    got = mla_decode(*tensors, scale=0.3, mask=mask, backend="native")
    assert (got - want).norm() < 2e-6 * want.norm()
    assert torch.equal(mla_decode(*tensors, scale=0.3, mask=mask), got)


@needs_native
def test_extreme_scores_and_poison_on_the_compiled_route():
    tensors = case(1, 4, 1, 200, 32, 8, dtype=torch.float32)
    for scale in (100.0, 1e-6):
        want = reference.mla_decode(*(t.double() for t in tensors), scale=scale)
        assert (mla_decode(*tensors, scale=scale, backend="native") - want).norm() < 1e-5 * want.norm()
    hidden = torch.zeros(1, 1, 1, 200, dtype=torch.bool)
    assert mla_decode(*tensors, scale=1.0, mask=hidden, backend="native").isfinite().all()
    for tensor, seen in ((tensors[0], slice(1, 2)), (tensors[2], slice(None))):
        kept = tensor.clone()
        tensor.view(-1, tensor.shape[-1])[1, 3] = torch.nan
        assert mla_decode(*tensors, scale=1.0, backend="native")[:, seen].isnan().all()
        tensor.copy_(kept)


@needs_native
def test_where_the_compiled_route_can_not_run():
    good = case(*WIDE_SHAPES[0], dtype=torch.float32)
    for bad, words in (
        (case(*WIDE_SHAPES[0]), "float64"),
        (case(1, 2, 1, 5, 24, 8, dtype=torch.float32), "multiple"),
        ([good[0].clone().requires_grad_(), *good[1:]], "gradients"),
    ):
        with pytest.raises(RuntimeError, match=words):
            mla_decode(*bad, scale=1.0, backend="native")
        assert mla_decode(*bad, scale=1.0).shape == bad[0].shape
    with pytest.raises(RuntimeError, match="mask"):
        mla_decode(*good, scale=1.0, mask=torch.zeros(1, 1, 1, 300), backend="native")


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_error_in_other_dtypes(dtype, limit):
    tensors = case(2, 4, 2, 50, 16, 8, dtype)
    got = mla_decode(*tensors, scale=0.2, mask=causal(2, 50))
    want = reference.mla_decode(*(t.double() for t in tensors), scale=0.2, mask=causal(2, 50))
    assert got.dtype == dtype
    assert (got.double() - want).norm() < limit * want.norm()


def test_a_query_that_sees_nothing_gives_no_nan():
    mask = causal(2, 5)
    mask[:, :, 0] = False
    assert mla_decode(*case(1, 2, 2, 5, 4, 2), scale=1.0, mask=mask).isfinite().all()


@pytest.mark.parametrize("backend", ["auto", "torch", "native", "triton"])
@pytest.mark.parametrize("change", [{"batch": 0}, {"heads": 0}, {"queries": 0}], ids=str)
def test_no_queries(change, backend):
    sizes = {"batch": 2, "heads": 3, "queries": 1} | change
    tensors = case(**sizes, tokens=9, rank=32, rope=8, dtype=torch.float32)
    assert mla_decode(*tensors, scale=1.0, backend=backend).shape == (*sizes.values(), 32)


def test_gradients():
    tensors = [tensor.requires_grad_() for tensor in case(2, 2, 2, 5, 3, 2)]
    assert torch.autograd.gradcheck(lambda *t: mla_decode(*t, scale=0.4, mask=causal(2, 5)), tensors)


@pytest.mark.parametrize("change", [(1, (2, 4, 1, 9)), (1, (2, 3, 1, 8)), (2, (1, 40, 16)), (3, (2, 39, 8))])
def test_shapes_that_do_not_fit(change):
    tensors = case(*SHAPES[1])
    tensors[change[0]] = torch.zeros(change[1], dtype=torch.float64)
    with pytest.raises(ValueError, match="mla_decode"):
        mla_decode(*tensors, scale=1.0)
    tensors = case(*SHAPES[1])
    with pytest.raises(ValueError, match="dtype"):
        mla_decode(*tensors[:2], tensors[2].float(), tensors[3], scale=1.0)
    with pytest.raises(ValueError, match="contiguous"):
        mla_decode(*tensors[:3], tensors[3].transpose(1, 2).contiguous().transpose(1, 2), scale=1.0)
    with pytest.raises(ValueError, match="mask"):
        mla_decode(*case(*SHAPES[1]), scale=1.0, mask=torch.ones(1, 1, 1, 3, dtype=torch.bool))


def test_triton_in_the_interpreter():
    pytest.importorskip("triton")
    printed = run_in_interpreter("mla_triton_cases.py")
    assert "cases" in printed


@pytest.mark.parametrize(("dtype", "words"), [(torch.float32, "16 bits"), (torch.float16, "triton is|on cpu")])
def test_triton_where_it_can_not_run(dtype, words):
    with pytest.raises(RuntimeError, match=words):
        mla_decode(*case(*SHAPES[0], dtype), scale=1.0, backend="triton")
    with pytest.raises(ValueError, match="backend="):
        mla_decode(*case(*SHAPES[0], torch.float16), scale=1.0, backend="cuda")
