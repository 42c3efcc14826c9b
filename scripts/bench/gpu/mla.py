"""Absorbed MLA decode."""

import torch
from timing import Bench, check

from reattend.kernels import mla_decode as mla
from reattend.kernels.mla_decode import products
from reattend.kernels.mla_decode.reference import mla_decode as mla_reference

# sequences, heads, tokens
CACHES = [(batch, 32, tokens) for tokens in (8192, 65536) for batch in (1, 8, 64)] + [(8, 128, 8192), (32, 16, 4096)]
RANK, ROPE = 512, 64


def bench_mla(bench: Bench, small: bool) -> None:
    """Check, then time."""
    halves = [dtype for dtype in bench.dtypes if dtype != torch.float32]
    print(check_mla(bench, halves, [(2, 3, 65)] if small else [(2, 3, 65), (8, 32, 8192)]), "mla variants are right")
    time_mla(bench, bench.timed, [(1, 4, 40)] if small else CACHES)


def mla_tensors(bench: Bench, dtype: torch.dtype, cache: tuple[int, int, int], widths: tuple[int, int]) -> list:
    """Queries and cached rows."""
    batch, heads, tokens = cache
    return [
        *(bench.numbers(batch, heads, 1, width, dtype=dtype) for width in widths),
        *(bench.numbers(batch, tokens, width, dtype=dtype) for width in widths),
    ]


def check_mla(bench: Bench, dtypes: list[torch.dtype], caches: list[tuple[int, int, int]]) -> int:
    """Against fp64; returns the number of comparisons."""
    count = 0
    for cache in caches:
        for widths in ((RANK, ROPE), (24, 8), (136, 20)):
            for dtype in dtypes:
                tensors = mla_tensors(bench, dtype, cache, widths)
                got = mla.mla_decode(*tensors, scale=0.05, backend="triton")
                want = mla_reference(*(t.double() for t in tensors), scale=0.05)
                check(got, want, ("mla_decode", cache, widths, dtype))
                count += 1
    return count


def time_mla(bench: Bench, dtype: torch.dtype, caches: list[tuple[int, int, int]]) -> None:
    """Decode of one token over a cache, against torch's products, and the rate at which rows are read."""
    copied = copy_rate(bench, 1 << (20 if bench.device == "cpu" else 30))
    print(f"\na copy reads and writes {copied:.0f} GB/s")
    print("sequences heads tokens | torch ms | Triton: as fast, GB/s of the cache, of the copy's rate")
    for cache in caches:
        batch, heads, tokens = cache
        tensors = mla_tensors(bench, dtype, cache, (RANK, ROPE))
        t = bench.medians(
            {
                "torch": lambda tensors=tensors: products.mla_decode(*tensors, 0.05, None),
                "ours": lambda tensors=tensors: mla.mla_decode(*tensors, scale=0.05, backend="triton"),
            }
        )
        rate = batch * tokens * (RANK + ROPE) * 2 / t["ours"] / 1e6
        ratios = f"{t['torch'] / t['ours']:6.2f} {rate:8.0f} {rate / copied:5.2f}"
        print(f"{batch:9} {heads:5} {tokens:6} | {t['torch']:8.3f} | {ratios}", flush=True)


def copy_rate(bench: Bench, nbytes: int) -> float:
    """GB/s that a copy reads and writes together."""
    source = torch.empty(nbytes, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    return 2 * nbytes / bench.medians({"copy": lambda: target.copy_(source)})["copy"] / 1e6
