"""The kernels of quantised attention in Triton's interpreter; run as a script with TRITON_INTERPRET=1.

A process of its own (see int8_triton_cases). bf16 can't be tried here: the interpreter multiplies it wrongly.
"""

import math
import sys

import torch

from reattend.kernels.attention_int8 import (
    Options,
    Quantization,
    attention_int8_with_lse,
    formulas,
    kernel,
    reference,
)
from reattend.kernels.attention_int8 import kernel_quantize as quantize

# batch, query heads, key heads, queries, keys, head dim, value dim: tails, one tile and several, every group size
SHAPES = [
    (1, 2, 2, 100, 100, 64, 64),
    (2, 3, 1, 30, 75, 40, 40),
    (1, 8, 1, 20, 130, 96, 24),
    (1, 6, 2, 65, 63, 72, 128),
    (1, 1, 1, 140, 129, 128, 96),
    (2, 2, 1, 9, 66, 256, 160),
]
OPTIONS = {
    "causal": lambda queries, tokens: Options(),
    "all": lambda queries, tokens: Options(causal=False, scale=0.2),
    "window": lambda queries, tokens: Options(window=17),
    "ranges": lambda queries, tokens: Options(ranges=ranges(queries, tokens)),
    "ranges, all": lambda queries, tokens: Options(causal=False, ranges=ranges(queries, tokens)),
    "ranges, window": lambda queries, tokens: Options(window=40, ranges=ranges(queries, tokens)),
}
HOWS = [Quantization(), Quantization(key_scales="token", smooth_v=True), Quantization(smooth_k=False)]
real_empty = torch.empty


def poisoned(*args, **kwargs):
    made = real_empty(*args, **kwargs)
    if made.dtype == torch.float8_e4m3fn:
        made.view(torch.uint8).fill_(0x7F)
        return made
    return made.fill_(torch.nan) if made.is_floating_point() else made.fill_(99)


def ranges(queries, tokens):
    """Room on the left, and on the right."""
    return torch.tensor([[7, tokens, tokens - queries], [0, tokens - 9, tokens - 9 - queries]])


def case(shape, options, dtype):
    batch, heads, groups, queries, tokens, width, wide = shape
    generator = torch.Generator().manual_seed(tokens)
    sizes = [(batch, queries, heads, width), (batch, tokens, groups, width), (batch, tokens, groups, wide)]
    # As models have them: heads behind tokens in memory.
    query, key, value = (torch.randn(size, generator=generator).transpose(1, 2) for size in sizes)
    key = key + 3 * torch.randn(width, generator=generator)
    if options.ranges is not None:
        for row, (first, end, _) in enumerate(options.ranges.tolist()):
            for x in (key, value):
                x[row, :, :first], x[row, :, end:] = torch.nan, torch.inf
    return [x.to(dtype) for x in (query, key, value)]


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


def close(got, want, dtype, what):
    # fp16: a weight is rounded relative to another maximum than the reference's. A mean's last bit, which depends on
    # the order of its sum, may move a code by one here and there.
    limit = {torch.float16: 1e-3, torch.float32: 5e-4}[dtype]
    error = relative(got[0], want[0])
    assert error < limit, f"{what}: {error:.2e}"
    assert torch.equal(got[1] == -torch.inf, want[1] == -torch.inf), what
    error = (got[1] - want[1]).nan_to_num(0.0).abs().max()
    assert error < 5e-3, f"{what}: log-sum-exp {error:.2e}"


def every_shape():
    count = 0
    for i, shape in enumerate(SHAPES):
        for j, (name, make) in enumerate(OPTIONS.items()):
            options = make(*shape[3:5])
            if options.ranges is not None and shape[0] != len(options.ranges):
                options = Options(options.causal, window=options.window, ranges=options.ranges[: shape[0]])
            how = HOWS[(i + j) % len(HOWS)]
            dtype = (torch.float16, torch.float32)[(i + j // 2) % 2]
            tensors = case(shape, options, dtype)
            got = attention_int8_with_lse(*tensors, options, how, backend="triton")
            want = attention_int8_with_lse(*tensors, options, how, backend="reference")
            close(got, want, dtype, (shape, name, how, dtype))
            count += 1
    return count


def codes_and_scales():
    """Equal bit for bit, given the same mean; means and value scales, but for the order of sums."""
    for shape in SHAPES:
        for how in (Quantization(), Quantization(key_scales="token")):
            for name in ("causal", "ranges, window"):
                options = OPTIONS[name](*shape[3:5])
                if options.ranges is not None:
                    options = Options(options.causal, window=options.window, ranges=options.ranges[: shape[0]])
                one_call(*case(shape, options, torch.float16), options, how)


def one_call(query, key, value, options, how):
    seen, bounds = formulas.seen_range(options, key, query.shape[2]), quantize.sight(query, key, options)
    width, scale = query.shape[3], options.scale_for(query.shape[3])
    mean = formulas.means(key, seen)
    got_mean, value_scale = quantize.columns(key, bounds, True, True)
    torch.testing.assert_close(got_mean, mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(value_scale, formulas.quantize_values(key, mean, seen)[1], atol=0, rtol=1e-4)
    codes, scales, shift = quantize.queries(query, mean, key.shape[1], scale)
    want_codes, want_scales = formulas.quantize_queries(query, scale * quantize._LOG2E)
    assert torch.equal(codes[..., :width], want_codes)
    assert not codes[..., width:].any()
    assert torch.equal(scales, want_scales)
    want_shift = reference._unshifted(torch.zeros_like(shift), query, mean, options)
    torch.testing.assert_close(shift, want_shift, atol=1e-4, rtol=1e-4)
    packed_keys(key, mean, seen, bounds, how)


def packed_keys(key, mean, seen, bounds, how):
    codes, scales = quantize.keys(key, mean, bounds, how)
    want_codes, want_scales = formulas.quantize_keys(key, mean, seen, how)
    for row, (first, end) in enumerate(seen.tolist()):
        assert torch.equal(codes[row, :, : end - first, : key.shape[3]], want_codes[row, :, first:end])
        want = want_scales[row, :, first:end]
        want = want if how.key_scales == "token" else want[:, :: formulas.KEY_BLOCK]
        assert torch.equal(scales[row, :, : want.shape[1]], want)


def values_of(value, mean, scale, bounds):
    """`quantize.values` with torch's cast: the interpreter's own loses the carry of the mantissa."""
    batch, heads, tokens, width = value.shape
    codes, _ = formulas.quantize_values(value, mean, torch.tensor([[0, tokens]] * batch))
    blocks = -(-tokens // formulas.KEY_BLOCK)
    packed = torch.zeros(batch, heads, blocks * formulas.KEY_BLOCK, quantize.padded(width))
    packed[:, :, :tokens, :width] = codes.float()
    split = packed.reshape(batch, heads, blocks, formulas.KEY_BLOCK, -1).transpose(3, 4)
    return split.contiguous().to(torch.float8_e4m3fn)


def fp8_values(smooth_v):
    """Weights are cast by the interpreter, wrongly for about 1 in 100: the bound is loose, the rest is exact."""
    options, how = Options(), Quantization(values="fp8", smooth_v=smooth_v)
    query, key, value = case((1, 2, 1, 80, 150, 64, 40), options, torch.float32)
    value = value + 5
    bounds = quantize.sight(query, key, options)
    mean, scale = quantize.columns(value, bounds, smooth_v, True)
    made, want = quantize.values(value, mean, scale, bounds).float(), values_of(value, mean, scale, bounds).float()
    assert made.shape == want.shape
    assert (made != want).float().mean() < 0.02
    real, quantize.values = quantize.values, values_of
    got = kernel.attention(query, key, value, options, how)
    quantize.values = real
    want = reference.attention(query, key, value, options, how)
    assert relative(got[0], want[0]) < 0.03
    assert (got[1] - want[1]).abs().max() < 1e-4


def fp8_weights():
    """Weights of 2^-11 survive e4m3 only as parts of 448: on a scale up to 1 they are below half its least number."""
    query, key, value = (torch.zeros(1, 1, size, 64) for size in (1, 128, 128))
    query[..., 0], key[:, :, 1:, 0], value[:, :, 1:] = 1.0, -11 * math.log(2), 1.0
    how = Quantization(values="fp8", smooth_k=False, key_scales="token")
    real, quantize.values = quantize.values, values_of
    output, _ = kernel.attention(query, key, value, Options(scale=1.0), how)
    quantize.values = real
    want = 127 * 2**-11 / (1 + 127 * 2**-11)
    torch.testing.assert_close(output, torch.full_like(output, want), atol=0, rtol=1e-4)


def single_values(dtype):
    """One key: its value, and nothing of the zeros or garbage beside it."""
    options = Options(causal=False, ranges=torch.tensor([[40, 41, 0]]))
    query, key, value = case((1, 1, 1, 3, 100, 64, 64), options, dtype)
    for how in HOWS:
        output, _ = attention_int8_with_lse(query, key, value, options, how, backend="triton")
        assert torch.equal(output, value[:, :, 40:41].expand_as(output))


def empty_rows_and_zero_blocks():
    options = Options(ranges=torch.tensor([[5, 5, 0], [0, 90, -10], [90, 90, 50]]))
    query, key, value = case((3, 1, 1, 30, 90, 64, 64), options, torch.float16)
    key[1, :, :64] = 1.0
    query[1, :, 12] = 0
    for how in HOWS:
        output, lse = attention_int8_with_lse(query, key, value, options, how, backend="triton")
        close((output, lse), reference.attention(query, key, value, options, how), torch.float16, how)
        assert not output[0].any()
        assert not output[1, :, :10].any()
        assert output[1, :, 10:].isfinite().all()


def large_values():
    """Upstream, 93: sums in fp16 overflow."""
    query, key, value = case((1, 1, 1, 40, 200, 64, 64), Options(), torch.float16)
    value = (value.abs() * 1e4).clamp(max=6e4)
    got = attention_int8_with_lse(query * 0, key, value, backend="triton")
    assert relative(got[0], reference.attention(query * 0, key, value, Options(), HOWS[0])[0]) < 1e-3


def nan_is_not_hidden():
    query, key, value = case((1, 2, 2, 20, 20, 64, 64), Options(), torch.float32)
    key[0, 0, 3, 5] = torch.inf
    query[0, 1, 7, 1] = torch.nan
    output, _ = attention_int8_with_lse(query, key, value, backend="triton")
    assert output[0, 0, 3:].isnan().all()
    assert output[0, 1, 7].isnan().all()
    assert output[0, 1, :7].isfinite().all()

    key = key.nan_to_num(posinf=torch.nan)
    for scales in ("block", "token"):
        how = Quantization(smooth_k=False, key_scales=scales)
        output, _ = attention_int8_with_lse(query, key, value, Options(), how, backend="triton")
        assert output[0, 0, 3:].isnan().all()
        assert scales == "block" or output[0, 0, :3].isfinite().all()


def refused():
    tensors = case((1, 1, 1, 9, 9, 64, 64), Options(), torch.float16)
    for inputs, how in ((tensors, Quantization(values="fp8")), ([x.bfloat16() for x in tensors], HOWS[0])):
        assert "interpreter" in str(kernel.unfit(*inputs, how))


def strided_and_permuted():
    """Last dimensions that aren't contiguous, and heads within a packed projection."""
    packed = torch.randn(1, 70, 4 * 3, 64, generator=torch.Generator().manual_seed(0)).half()
    tensors = [packed[:, :, 4 * i : 4 * i + 4].transpose(1, 2) for i in range(3)]
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in tensors]
    one, other = (attention_int8_with_lse(*x, backend="triton") for x in (tensors, turned))
    assert torch.equal(one[0], other[0])
    close(one, reference.attention(*tensors, Options(), HOWS[0]), torch.float16, "packed")


def main():
    torch.empty = poisoned
    count = every_shape()
    codes_and_scales()
    for flag in (False, True):
        fp8_values(flag)
    fp8_weights()
    for dtype in (torch.float16, torch.float32):
        single_values(dtype)
    empty_rows_and_zero_blocks()
    large_values()
    nan_is_not_hidden()
    refused()
    strided_and_permuted()
    print(f"{count} cases")


if __name__ == "__main__":
    sys.exit(main())
