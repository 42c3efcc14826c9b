"""Exact and quantised attention against torch's flash attention, and SageAttention's own Triton kernels."""

from importlib.util import find_spec

import torch
from timing import Bench, Calls, check
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from reattend.kernels.attention import Options, attention, reference
from reattend.kernels.attention_int8 import Quantization, attention_int8

# batch, query heads, key heads, queries, keys, head dim
ODD = [(2, 3, 1, 33, 33, 64), (1, 4, 2, 65, 130, 96), (2, 2, 2, 1, 300, 128)]
TOKENS = (2048, 8192, 32768)
HEADS = 32
QUANTISED = 0.05  # relative L2 against exact attention, on normal numbers
FP8 = Quantization(values="fp8")


def bench_attention(bench: Bench, small: bool) -> None:
    """Check, then time."""
    print(check_attention(bench, ODD[:2] if small else ODD), "attention variants are right")
    for width in (64,) if small else (64, 128):
        for causal in (True, False):
            time_attention(bench, width, causal, (64,) if small else TOKENS)


def check_attention(bench: Bench, shapes: list[tuple[int, ...]]) -> int:
    """Every variant on odd shapes, against sums in fp64; returns the number of comparisons."""
    count = 0
    for shape in shapes:
        for dtype in bench.dtypes:
            tensors = inputs(bench, shape, dtype)
            want, _ = reference.attention(*(tensor.double() for tensor in tensors), Options())
            check(attention(*tensors, backend="triton"), want, ("attention", shape, dtype), 2 * 2e-3)
            quantised = attention_int8(*tensors, backend="triton")
            check(quantised, want, ("attention_int8", shape, dtype), QUANTISED)
            count += 2
    return count


def inputs(bench: Bench, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, keys and values."""
    batch, heads, groups, queries, tokens, width = shape
    return [
        bench.numbers(batch, count, length, width, dtype=dtype)
        for count, length in ((heads, queries), (groups, tokens), (groups, tokens))
    ]


def time_attention(bench: Bench, width: int, causal: bool, lengths: tuple[int, ...]) -> None:
    """One shape at a time: how many times as fast as torch's flash attention."""
    names = ["exact", "int8 + fp16", "int8 + fp8", "sageattention"]
    print(f"\nd {width}, {'causal' if causal else 'all keys'}; tokens | flash ms | as fast: {'  '.join(names)}")
    for tokens in lengths:
        batch, heads = (1, 2) if bench.device == "cpu" else (max(1, 32768 // tokens // 4), HEADS)
        tensors = inputs(bench, (batch, heads, heads, tokens, tokens, width), torch.float16)
        t = bench.medians(calls(bench, tensors, causal))
        ratios = "  ".join(f"{t['flash'] / t[n]:{len(n)}.2f}" if n in t else f"{'-':>{len(n)}}" for n in names)
        print(f"{tokens:6} | {t['flash']:8.3f} | {ratios}", flush=True)


def calls(bench: Bench, tensors: list[torch.Tensor], causal: bool) -> Calls:
    """The candidates of one shape."""
    options = Options(causal=causal)
    found: Calls = {
        "flash": lambda: flash(tensors, causal),
        "exact": lambda: attention(*tensors, options, backend="triton"),
        "int8 + fp16": lambda: attention_int8(*tensors, options, backend="triton"),
    }
    if bench.device == "cpu":
        return found
    if torch.cuda.get_device_capability() >= (8, 9):
        found["int8 + fp8"] = lambda: attention_int8(*tensors, options, FP8, backend="triton")
    if find_spec("sageattention"):
        from sageattention import sageattn

        found["sageattention"] = lambda: sageattn(*tensors, is_causal=causal)
    return found


def flash(tensors: list[torch.Tensor], causal: bool) -> torch.Tensor:
    """torch's flash attention, and nothing else."""
    if not tensors[0].is_cuda:
        return scaled_dot_product_attention(*tensors, is_causal=causal)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(*tensors, is_causal=causal)
