"""How far activations and attention depart from even: inf-norm, kurtosis, the first key's share.

The first two as Bondarenko et al. measure them (arXiv 2306.12929, section 5), on one window's activations at a time.

Legend: B batch, H query heads, G key heads, S queries, T keys, D head dim.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from reattend.kernels.attention import Options
from reattend.kernels.attention.reference import scores, weights

_EPSILON = 1e-6  # of the paper's code, beside the squared variance
_SCORES = 1 << 23  # numbers of scores at a time
SKIPPED_QUERIES = 1  # the first token sees no other key


def inf_norm(x: Tensor) -> float:
    """Return the largest magnitude in `x` (any shape)."""
    return float(torch.maximum(x.max(), -x.min()))


def kurtosis(x: Tensor) -> float:
    """Return m4 / (m2^2 + 1e-6) of all numbers of `x` (any shape), with central moments in fp64; 3 for a normal one.

    Variances are divided by the count, not the count less one.
    """
    squares = x.double().flatten()
    squares = (squares - squares.mean()).square_()
    return float(squares.square().mean() / (squares.mean().square() + _EPSILON))


class SinkSums(NamedTuple):
    """Sums over queries behind the first `SKIPPED_QUERIES` of a window, by head (H,), fp64; and their number."""

    mass: Tensor
    largest: Tensor
    queries: int


def sink_sums(query_BHSD: Tensor, key_BGTD: Tensor, options: Options) -> SinkSums:
    """Sum the weight that queries give the first key, and how many of them give no other key more.

    A key that a query doesn't see (a sliding window) gets 0. A few queries at a time, in fp32 (fp64 for fp64).
    """
    heads, queries = query_BHSD.shape[1:3]
    mass, largest = torch.zeros(2, heads, dtype=torch.float64)
    for first, score_BHRT, rows in score_blocks(query_BHSD, key_BGTD, options):
        weight_BHRT = weights(score_BHRT, rows)[0][:, :, max(SKIPPED_QUERIES - first, 0) :]
        sink_BHR = weight_BHRT[..., 0]
        top_BHR = (sink_BHR > 0) & (sink_BHR >= weight_BHRT.amax(-1))
        mass += sink_BHR.double().sum((0, 2)).cpu()
        largest += top_BHR.double().sum((0, 2)).cpu()
    return SinkSums(mass, largest, len(query_BHSD) * (queries - SKIPPED_QUERIES))


def score_blocks(query_BHSD: Tensor, key_BGTD: Tensor, options: Options) -> Iterator[tuple[int, Tensor, Options]]:
    """Yield the first query, the scores (B, H, R, T) and the options of a few queries at a time."""
    batch, heads, queries, _ = query_BHSD.shape
    dtype = torch.float64 if query_BHSD.dtype == torch.float64 else torch.float32
    size = max(1, _SCORES // (batch * heads * key_BGTD.shape[2]))
    for first in range(0, queries, size):
        last = min(first + size, queries)
        rows = options.rows(first, last, key_BGTD, queries)
        yield first, scores(query_BHSD[:, :, first:last], key_BGTD, rows, dtype), rows
