"""Static outlier columns (LLM.int8(), arXiv 2208.07339, section 3): which input channels stay in floating point.

The paper takes every channel that reaches a threshold, batch by batch. Here they are chosen once, by how much of the
expected error they cause: a channel that sets the range of many tokens makes every other channel's step coarser.

Legend: N tokens, I input channels, K columns in the order of their removal.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from reattend.quantize.int8.formulas import CODE_MAX
from reattend.quantize.int8.smoothing import weigh_linear


def removal_order(x_NI: Tensor, weights_OI: Sequence[Tensor], most: int) -> tuple[Tensor, Tensor]:
    """Return columns (K,) in the order of removal and the expected error (K + 1,) with the first k of them removed.

    Each in turn is the channel with the largest share of the activations' error: the sum over the tokens whose range
    it sets. K is `most`, or I - 1.
    """
    loudest = _Loudest(x_NI.float(), weights_OI, min(most, x_NI.shape[1] - 1))
    columns: list[int] = []
    errors = [loudest.error(columns)]
    for _ in range(loudest.most):
        columns.append(loudest.worst())
        loudest.remove(columns[-1])
        errors.append(loudest.error(columns))
    return torch.tensor(columns, dtype=torch.int64), torch.tensor(errors)


class _Loudest:
    """The channels that can set a token's range while at most `most` columns are removed: its `most` + 1 largest.

    On the CPU in fp64: sums over tokens are in one order, so that the same inputs give the same columns.
    """

    def __init__(self, x_NI: Tensor, weights_OI: Sequence[Tensor], most: int) -> None:
        top = x_NI.abs().topk(most + 1, dim=1)
        self.most, self._left_NK, self._channel_NK = most, top.values.double().cpu(), top.indices.cpu()
        weighed = [weigh_linear(x_NI, weight.float()) for weight in weights_OI]
        self._weight_LN = torch.stack([linear.weight_N for linear in weighed]).double().cpu()
        self._gain_LI = torch.stack([linear.gain_I for linear in weighed]).double().cpu()
        ranges = [torch.exp2(2 * linear.log_w_OI.amax(1)).sum() for linear in weighed]
        self._cost_LI = (
            torch.stack([w * linear.cost_I for w, linear in zip(ranges, weighed, strict=True)]).double().cpu()
        )

    def worst(self) -> int:
        """The channel that sets the ranges of the tokens with the largest share of the error."""
        largest_N, at_N = self._left_NK.max(1)
        share_N = (self._weight_LN * self._gain_LI.sum(1, keepdim=True)).sum(0) * largest_N.square()
        channels_N = self._channel_NK.gather(1, at_N[:, None]).flatten()
        return int(torch.bincount(channels_N, share_N).argmax())

    def remove(self, channel: int) -> None:
        """Take a channel out of every token's range."""
        self._left_NK[self._channel_NK == channel] = 0

    def error(self, columns: Sequence[int]) -> float:
        """The expected error (see `ExpectedError`) with s = 1 and the removed `columns` in floating point."""
        square_L = self._weight_LN @ self._left_NK.amax(1).square()
        gain_L, cost_L = (v.sum(1) - v[:, list(columns)].sum(1) for v in (self._gain_LI, self._cost_LI))
        return float((square_L * gain_L + cost_L).mean()) / (12 * CODE_MAX**2)


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
