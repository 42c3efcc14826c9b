"""The Triton attention kernels in Triton's interpreter; run as a script with TRITON_INTERPRET=1 (int8_triton_cases)."""

import sys
from dataclasses import replace

import numpy as np
import torch

from reattend.kernels.attention import (
    Options,
    attention,
    attention_with_lse,
    kernel,
    kernel_backward,
    kernel_decode,
    reference,
    triton_route,
)

LIMITS = {torch.float32: 2e-6, torch.float16: 2e-3}
GRADIENT_LIMITS = {torch.float32: 1e-5, torch.float16: 4e-3}
real_empty = torch.empty
counts = dict.fromkeys(("forward", "backward", "decode"), 0)

# batch, query heads, key heads, queries, keys, head dim, value dim
SHAPES = {
    "narrow": (1, 3, 3, 63, 63, 40, 72),
    "64": (2, 3, 1, 130, 130, 64, 64),
    "grouped": (1, 8, 1, 70, 133, 72, 96),
    "128": (1, 2, 2, 130, 150, 128, 128),
    "latent": (1, 2, 1, 65, 100, 192, 128),
    "wide": (1, 2, 1, 40, 90, 96, 130),
    "widest": (1, 3, 1, 66, 80, 256, 256),
    "tiny": (2, 2, 2, 20, 21, 8, 1),
    "one key": (1, 2, 1, 19, 1, 64, 40),
}
BATCHED = (4, 2, 1, 67, 67, 64, 48)


def poisoned(*args, **kwargs):
    return real_empty(*args, **kwargs).fill_(torch.nan)


def tensors(shape, dtype, seed=0):
    """As models have them: heads behind tokens in memory, keys and values in a larger buffer."""
    batch, heads, groups, queries, keys, width, values = shape
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, queries, heads, width), (batch, keys + 3, groups, width), (batch, keys + 3, groups, values)
    q, k, v = (torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes)
    return q, k[:, :, :keys], v[:, :, :keys]


def padded_ranges(shape):
    """Left padding (queries without a key), right padding, another offset each, and a sequence of one key."""
    keys, offset = shape[4], shape[4] - shape[3]
    rows = [[9, keys, offset], [0, keys - 11, offset - 11], [3, keys - 5, offset + 2], [17, 18, offset]]
    return torch.tensor(rows[: shape[0]])


def options_of(shape):
    """Options by name, for any shape and for some."""
    heads = shape[1]
    slopes, sinks = torch.linspace(0.1, 1, heads), torch.linspace(-1, 4, heads)
    gamma = torch.linspace(-0.2, -0.001, heads)
    return {
        "causal": Options(),
        "all": Options(causal=False, scale=0.2),
        "window": Options(window=9),
        "long window": Options(window=50, softcap=3.0, sinks=sinks),
        "slopes": Options(slopes=slopes, softcap=5.0),
        "distance": Options(slopes=slopes, causal=False),
        "sinks": Options(sinks=sinks, causal=False),
        "clipped": Options(gamma=gamma, zeta=1.2, scale=1.0),
        "gamma": Options(gamma=gamma, slopes=slopes, window=30, softcap=8.0),
        "zeta": Options(causal=False, zeta=1.5),
    }


def relative(got, want):
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))


def close(got, want, limit, label):
    assert not got.isnan().any(), (label, "NaN")
    error = relative(got, want)
    assert error < limit, (label, error)


def compare(inputs, options, label, kind="forward"):
    """One call against the reference in fp64, which sees zeros where padding holds NaN."""
    got, lse = attention_with_lse(*inputs, options, backend="triton")
    want, exact = reference.attention(*(tensor.double().nan_to_num() for tensor in inputs), options)
    assert got.dtype == inputs[0].dtype
    assert lse.dtype == torch.float32
    assert got.transpose(1, 2).is_contiguous()
    close(got, want, LIMITS[got.dtype], label)
    empty = exact.isinf()
    assert torch.equal(lse.isinf(), empty), (label, "rows without a key")
    assert (lse - exact)[~empty].abs().max() < 2e-5 if not empty.all() else True, label
    assert (got[empty] == 0).all(), label
    counts[kind] += 1


def forward_cases():
    for number, (name, shape) in enumerate(SHAPES.items()):
        for turn, (kind, options) in enumerate(options_of(shape).items()):
            dtype = torch.float32 if (number + turn) % 2 else torch.float16
            if name in ("64", "tiny") or (turn + number) % 3 == 0:
                compare(tensors(shape, dtype), options, (name, kind, dtype))
    for options in options_of(BATCHED).values():
        compare_padded(BATCHED, options)


def compare_padded(shape, options, kind="forward"):
    ranges = padded_ranges(shape)
    inputs = tensors(shape, torch.float32)
    for tensor in inputs[1:]:
        for row, (first, end, _) in zip(tensor, ranges.tolist(), strict=True):
            row[:, :first] = row[:, end:] = torch.nan
    compare(inputs, replace(options, ranges=ranges), ("ranges", options), kind)


def small_tiles():
    """Many tiles: of every kind of row before, inside and behind what a mask hides."""
    kept = kernel._FP32
    kernel._FP32 = kernel.Config(16, 16, 4, 2)
    for options in options_of(BATCHED).values():
        compare_padded(BATCHED, options)
    for keys in range(40, 57):  # every place of the diagonal in a tile
        for window in (None, 1, 21):
            compare(tensors((1, 1, 1, 33, keys, 16, 16), torch.float32), Options(window=window), (keys, window))
    kernel._FP32 = kept


def layouts():
    q, k, v = tensors((2, 4, 2, 40, 40, 64, 64), torch.float32)
    fused = torch.randn(2, 40, 4 * 192).unflatten(-1, (4, 192)).transpose(1, 2)
    for case in (
        (q.contiguous(), k.contiguous(), v.contiguous()),
        fused.split(64, -1),
        (q[:1].expand(2, -1, -1, -1), k[:, :1].expand(-1, 2, -1, -1), v),
        (q.transpose(2, 3).contiguous().transpose(2, 3), k[..., ::2].repeat(1, 1, 1, 2), v.flip(-1)[..., ::4]),
    ):
        compare(case, Options(), "layout")
        compare(
            [tensor[:, :, -3:] if tensor is case[0] else tensor for tensor in case], Options(), "layout", "decode"
        )


def skipped_tiles():
    """Scores fall with distance: of values of far tiles, which no query weighs above 0, not even NaN matters."""
    shape = (1, 2, 1, 256, 256, 16, 16)
    q, k, v = tensors(shape, torch.float32)
    options = Options(slopes=torch.tensor([1.0, 1.0]), gamma=torch.tensor([-0.01, -0.02]), causal=False)
    compare((q, k, v), options, "skips")
    want = attention(q, k, v, options, backend="triton")
    v = v.clone()
    v[:, :, 192:] = torch.nan
    got = attention(q, k, v, options, backend="triton")
    assert got[:, :, 192:].isnan().all()
    assert torch.equal(got[:, :, :128], want[:, :, :128])


def decode_cases():
    shape = (3, 6, 2, 5, 150, 72, 40)
    rows = torch.tensor([[7, 150, 145], [0, 90, 85], [0, 150, -3]])
    kept = kernel_decode._PROGRAMS
    for programs in (1, 7, kept):
        kernel_decode._PROGRAMS = programs
        for name, options in options_of(shape).items():
            if options.is_clipped:
                continue
            if programs == 7:
                compare(tensors(shape, torch.float16), options, (name, programs), "decode")
            inputs = tensors(shape, torch.float32)
            for tensor in inputs[1:]:
                tensor[0, :, :7] = tensor[1, :, 90:] = torch.nan
            compare(inputs, replace(options, ranges=rows), (name, programs, "ranges"), "decode")
    kernel_decode._PROGRAMS = kept
    for wide in ((1, 2, 2, 1, 1, 64, 64), (2, 8, 1, 1, 700, 128, 128), (1, 71, 1, 1, 70, 64, 64)):
        compare(tensors(wide, torch.float16), Options(), wide, "decode")
    for wide in ((1, 16, 2, 16, 33, 256, 256), (1, 4, 2, 3, 90, 192, 128), (1, 2, 1, 1, 65, 96, 160)):
        compare(tensors(wide, torch.float32), Options(), wide, "decode")


def gradients(inputs, options, seed=1):
    """Gradients of inputs and sinks, of random sums of both outputs: ours, and the reference's in fp64."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*inputs[0].shape[:3], inputs[2].shape[3])
    weights = torch.randn(shape, generator=generator), torch.randn(shape[:3], generator=generator)
    results = []
    for run, dtype in ((ours, inputs[0].dtype), (reference.attention, torch.float64)):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        sinks = None if options.sinks is None else options.sinks.detach().to(dtype).requires_grad_()
        output, lse = run(*leaves, replace(options, sinks=sinks))
        total = (output * weights[0]).sum() + (lse.masked_fill(lse.isinf(), 0) * weights[1]).sum()
        total.backward()
        results.append([leaf.grad for leaf in leaves] + ([] if sinks is None else [sinks.grad]))
    return results


def ours(*arguments):
    return attention_with_lse(*arguments, backend="triton")


def compare_gradients(inputs, options, label):
    for name, got, want in zip("qkvs", *gradients(inputs, options), strict=False):
        assert got.dtype == inputs[0].dtype
        close(got, want.nan_to_num(), GRADIENT_LIMITS[got.dtype], (label, name))
    counts["backward"] += 1


def backward_cases():
    for number, (name, shape) in enumerate(SHAPES.items()):
        for turn, (kind, options) in enumerate(options_of(shape).items()):
            dtype = torch.float32 if (number + turn) % 4 else torch.float16
            if name == "tiny" or (turn + number) % 4 == 0:
                compare_gradients(tensors(shape, dtype), options, (name, kind, dtype))
    for options in options_of(BATCHED).values():
        ranged = replace(options, ranges=padded_ranges(BATCHED))
        compare_gradients(tensors(BATCHED, torch.float32), ranged, ("ranges", options))
    compare_gradients(tensors((2, 6, 2, 4, 70, 64, 64), torch.float32), Options(sinks=torch.zeros(6)), "few queries")


def small_gradient_tiles():
    kept = kernel_backward.CONFIGS
    kernel_backward.CONFIGS = {256: (kernel.Config(16, 16, 4, 2),) * 4}
    shape = (2, 2, 1, 50, 61, 16, 16)
    ranges = torch.tensor([[5, 61, 11], [0, 40, -9]])
    for options in options_of(shape).values():
        compare_gradients(tensors(shape, torch.float32), options, "small")
        ranged = replace(options, ranges=ranges)
        compare_gradients(tensors(shape, torch.float32), ranged, "small, ranges")
    for keys in range(40, 57):
        for window in (None, 31):
            inputs = tensors((1, 1, 1, 40, keys, 16, 16), torch.float32)
            compare_gradients(inputs, Options(window=window), ("small", keys, window))
    kernel_backward.CONFIGS = kept


def gradient_edges():
    inputs = tensors((1, 2, 1, 20, 20, 16, 16), torch.float32)
    first, second = (gradients(inputs, Options())[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    # Padding that holds NaN leaves zeros in the gradients, and nothing else behind.
    q, k, v = (tensor.clone() for tensor in inputs)
    k[:, :, :4] = v[:, :, :4] = torch.nan
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    ranged = Options(ranges=torch.tensor([[4, 20, 0]]))
    attention(*leaves, ranged, backend="triton").sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert (leaves[1].grad[:, :, :4] == 0).all()
    assert (leaves[0].grad[:, :, :4] == 0).all()
    # Only the log-sum-exp: its gradient in a score is the score's weight, so that of keys' sums is the queries' mean.
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    ours(*leaves, Options(causal=False, scale=1.0))[1].sum().backward()
    assert leaves[2].grad is None or not leaves[2].grad.any()
    close(leaves[1].grad.sum((1, 2)), inputs[0].double().sum((1, 2)), 1e-5, "lse alone")


def poison():
    """NaN in a query is NaN in its row alone, and in a key in the rows that see it; in a value in those at least."""
    for queries, options in ((20, Options()), (20, Options(gamma=torch.full((2,), -0.1))), (3, Options())):
        inputs = tensors((1, 2, 1, queries, 40, 16, 16), torch.float32)
        second, last = torch.arange(queries) == 1, torch.arange(queries) == queries - 1
        for number, place, rows in ((0, 1, second), (1, 39, last), (2, 39, last)):
            spoilt = [tensor.clone() for tensor in inputs]
            spoilt[number][0, 0, place, 5] = torch.nan
            spoiled = attention(*spoilt, options, backend="triton")[0, 0].isnan().any(-1)
            assert spoiled[rows].all(), (queries, number)
            assert number == 2 or torch.equal(spoiled, rows), (queries, number)


def positive_gamma():
    """Where it can't be refused, as on a GPU, it makes NaN of its heads, not something that looks right."""
    inputs = tensors((1, 2, 1, 20, 40, 16, 16), torch.float32)
    options = Options(gamma=torch.tensor([0.1, -0.1]))
    for output in (kernel.forward(*inputs, options)[0], reference.attention(*inputs, options)[0]):
        assert output[:, 0].isnan().all()
        assert output[:, 1].isfinite().all()


def routes():
    q, k, v = tensors((1, 2, 1, 17, 20, 16, 16), torch.float32)
    taken = []
    for module, name in ((kernel, "forward"), (kernel_decode, "decode")):
        kept = getattr(module, name)
        setattr(module, name, lambda *a, name=name, kept=kept: taken.append(name) or kept(*a))
    for queries, options in ((17, Options()), (16, Options()), (16, Options(zeta=1.1)), (1, Options(causal=False))):
        attention(q[:, :, :queries], k, v, options, backend="triton")
    assert taken == ["forward", "decode", "forward", "decode"]
    bf16 = [tensor.bfloat16() for tensor in (q, k, v)]
    assert "bf16" in triton_route.unfit(*bf16, Options())


def main():
    torch.empty = poisoned
    np.seterr(divide="ignore")  # log2 of the sum of a row without keys
    for run in (
        forward_cases, small_tiles, layouts, skipped_tiles, decode_cases, backward_cases, small_gradient_tiles,
        gradient_edges, poison, positive_gamma, routes,
    ):  # fmt: skip
        run()
    print(*(f"{count} {name}" for name, count in counts.items()), "cases")


if __name__ == "__main__":
    sys.exit(main())
