"""Static outlier columns (LLM.int8(), arXiv 2208.07339, section 3): which input channels stay in floating point.

The paper takes every channel that reaches a threshold, batch by batch. Here they are chosen once, by how much of the
expected error they cause: a channel that sets the range of many tokens makes every other channel's step coarser.

Legend: N tokens, I input channels, K columns in the order of their removal.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from reattend.quantize.int8.smoothing import ExpectedError


def removal_order(error: ExpectedError, most: int) -> tuple[Tensor, Tensor]:
    """Return columns (K,) in the order of removal and the expected error (K + 1,) with the first k of them removed.

    Each in turn is the channel with the largest share of the error: the sum over the tokens whose range it sets.
    """
    columns: list[int] = []
    errors = [float(error.without(columns))]
    for _ in range(min(most, error.channels - 1)):
        columns.append(int(error.shares(columns).argmax()))
        errors.append(float(error.without(columns)))
    return torch.tensor(columns, dtype=torch.int64), torch.tensor(errors)


def allocate(curves: Mapping[str, Tensor], costs: Mapping[str, int], budget: int) -> dict[str, int]:
    """Return how many columns each input gets: the least sum of errors for which the numbers fit into `budget`.

    `curves` maps an input to its error (K + 1,) with k columns removed, `costs` to the numbers of one column. By one
    price for all (a Lagrange multiplier), bisected: each input takes the k of the least error plus price.
    """
    low, high = 0.0, max((float(curve[0]) for curve in curves.values()), default=0.0)
    if _spent(chosen := _take(curves, costs, low), costs) <= budget:
        return chosen
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if _spent(_take(curves, costs, middle), costs) <= budget else (middle, high)
    return _take(curves, costs, high)


def _take(curves: Mapping[str, Tensor], costs: Mapping[str, int], price: float) -> dict[str, int]:
    def count(name: str, curve: Tensor) -> int:
        return int((curve + price * costs[name] * torch.arange(len(curve))).argmin())

    return {name: count(name, curve) for name, curve in curves.items()}


def _spent(counts: Mapping[str, int], costs: Mapping[str, int]) -> int:
    return sum(count * costs[name] for name, count in counts.items())


def ascending(columns_K: Tensor, slices: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return columns in ascending order, and each float slice (O, K) likewise."""
    order = columns_K.argsort()
    return columns_K[order], [piece[:, order].contiguous() for piece in slices]
