"""Decode of layers that share attention."""

import torch
from timing import Bench, check

from reattend.kernels.attention import Options, reference
from reattend.kernels.shared_decode import Row, follow, lead

# sequences, query heads, key heads, tokens, head dim
ODD = [(1, 9, 3, 300, 24), (2, 4, 4, 65, 40), (1, 20, 1, 1030, 72), (3, 32, 8, 4097, 128)]
CACHES = [(batch, 32, 8, tokens, 128) for tokens in (4096, 32768) for batch in (1, 16)]


def bench_shared(bench: Bench, small: bool) -> None:
    """Check, then time."""
    print(check_shared(bench, ODD[:2] if small else ODD), "shared variants are right")
    time_shared(bench, [(1, 4, 2, 40, 16)] if small else CACHES)


def tensors_of(bench: Bench, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, keys, the leader's values and a follower's."""
    batch, heads, groups, tokens, width = shape
    query = bench.numbers(batch, heads, 1, width, dtype=dtype)
    return [query, *(bench.numbers(batch, groups, tokens, width, dtype=dtype) for _ in range(3))]


def check_shared(bench: Bench, shapes: list[tuple[int, ...]]) -> int:
    """Leaders and followers on odd shapes against sums in fp64; returns the number of comparisons."""
    count = 0
    for shape in shapes:
        for dtype in bench.dtypes:
            query, key, *values = tensors_of(bench, shape, dtype)
            led, row = run(query, key, values[0])
            for got, value in ((led, values[0]), (follow(row, values[1], backend="triton"), values[1])):
                exact = (tensor.double() for tensor in (query, key, value))
                want, _ = reference.attention(*exact, Options(causal=False, scale=0.1))
                check(got, want, ("shared_decode", shape, dtype))
                count += 1
    return count


def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, Row]:
    """The Triton route of a leader."""
    return lead(query, key, value, scale=0.1, backend="triton")


def time_shared(bench: Bench, shapes: list[tuple[int, ...]]) -> None:
    """A leader and a follower beside a layer of its own, which is torch's attention of one query."""
    print("\nsequences tokens | sdpa ms | as fast: leader, follower")
    for shape in shapes:
        query, key, *values = tensors_of(bench, shape, bench.timed)
        _, row = run(query, key, values[0])
        t = bench.medians(
            {
                "sdpa": lambda q=query, k=key, v=values[0]: torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, enable_gqa=True
                ),
                "leader": lambda q=query, k=key, v=values[0]: run(q, k, v),
                "follower": lambda row=row, v=values[1]: follow(row, v, backend="triton"),
            }
        )
        ratios = f"{t['sdpa'] / t['leader']:6.2f} {t['sdpa'] / t['follower']:6.2f}"
        print(f"{shape[0]:9} {shape[3]:6} | {t['sdpa']:7.3f} | {ratios}", flush=True)
