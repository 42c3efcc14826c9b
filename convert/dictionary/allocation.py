"""Ranks for many matrices within one budget of numbers: each at the same price.

A matrix of M x N at rank R takes R (M + N) numbers; where that is no less than M N it stays whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Curve:
    """What a matrix puts wrong by its rank (K,), from 0 on; `shape` (M, N). With `whole` it may stay as it is."""

    error: Tensor
    shape: tuple[int, int]
    whole: bool = True

    @property
    def numbers(self) -> int:
        """Numbers of the matrix as it is."""
        return self.shape[0] * self.shape[1]

    @cached_property
    def options(self) -> tuple[Tensor, Tensor]:
        """Numbers taken and error of every choice: ranks from 1 to below `numbers`, then, where it may, whole."""
        each = sum(self.shape)
        most = max(1, min(len(self.error) - 1, (self.numbers - 1) // each))
        costs = torch.arange(1, most + 1, dtype=torch.float64) * each
        errors = self.error[1 : most + 1].double()
        if not self.whole:
            return costs, errors
        whole = torch.tensor([float(self.numbers)], dtype=torch.float64)
        return torch.cat([costs, whole]), torch.cat([errors, torch.zeros_like(whole)])

    def rank(self, choice: int) -> int | None:
        """Return the rank of a choice, None for whole."""
        return None if self.whole and choice == len(self.options[0]) - 1 else choice + 1


@dataclass(frozen=True)
class Option:
    """One way to make some matrices: numbers that they share, and the curve of each."""

    shared: int
    curves: Mapping[str, Curve]

    def taken(self, price: float) -> tuple[dict[str, int], float]:
        """Return each curve's best choice at a price per number, and what all of it costs with the errors."""
        picks, total = {}, price * self.shared
        for name, curve in self.curves.items():
            cost, error = curve.options
            costs = error + price * cost
            picks[name] = int(costs.argmin())
            total += float(costs[picks[name]])
        return picks, total

    def spent(self, picks: Mapping[str, int]) -> float:
        """Return the numbers that choices take."""
        return self.shared + sum(float(curve.options[0][picks[name]]) for name, curve in self.curves.items())


Options = Mapping[str, Sequence[Option]]


def allocate(options: Options, budget: int) -> tuple[dict[str, int], dict[str, int | None]]:
    """Return which option each key takes, and each matrix's rank, or None for whole, within `budget` numbers.

    The least sum of errors: one price for all numbers (a Lagrange multiplier) is bisected, and each key takes the
    option, each matrix the rank, of the least error plus price. What is left then goes where a number gains most.
    Raises `ValueError` for a budget that does not give each matrix rank 1.
    """
    least = _spent(options, _take(options, _ENDLESS))
    if least > budget:
        raise ValueError(f"{least:.0f} numbers are the least, {budget} may be kept")
    low, high, chosen = 0.0, _highest(options), _take(options, 0.0)
    if _spent(options, chosen) > budget:
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (low, middle) if _spent(options, _take(options, middle)) <= budget else (middle, high)
        chosen = _take(options, high)
    picked = {key: options[key][index] for key, (index, _) in chosen.items()}
    curves = {name: curve for option in picked.values() for name, curve in option.curves.items()}
    picks = {name: pick for _, found in chosen.values() for name, pick in found.items()}
    _fill(curves, picks, budget - _spent(options, chosen))
    return {key: index for key, (index, _) in chosen.items()}, {n: curves[n].rank(pick) for n, pick in picks.items()}


_Chosen = Mapping[str, tuple[int, dict[str, int]]]
_ENDLESS = 1e200  # a price at which only numbers count


def _take(options: Options, price: float) -> _Chosen:
    found = {}
    for key, ways in options.items():
        taken = [way.taken(price) for way in ways]
        index = min(range(len(ways)), key=lambda i: taken[i][1])
        found[key] = (index, taken[index][0])
    return found


def _spent(options: Options, chosen: _Chosen) -> float:
    return sum(options[key][index].spent(picks) for key, (index, picks) in chosen.items())


def _highest(options: Options) -> float:
    """A price at which only numbers count: the sum of all errors, as numbers are whole."""
    return (
        sum(
            max(sum(float(curve.error[0]) for curve in way.curves.values()) for way in ways)
            for ways in options.values()
        )
        + 1e-300
    )


def _fill(curves: Mapping[str, Curve], chosen: dict[str, int], left: float) -> None:
    """Spend what a price left over: again and again on the choice that gains most per number."""
    options = {name: curve.options for name, curve in curves.items()}
    while True:
        best, gain, taken = "", 0.0, 0
        for name, (cost, error) in options.items():
            now = chosen[name]
            more, less = cost[now + 1 :] - cost[now], error[now] - error[now + 1 :]
            rate = torch.where(more <= left, less / more.clamp_min(1), -1.0)
            if len(rate) and float(rate.max()) > gain:
                best, gain, taken = name, float(rate.max()), now + 1 + int(rate.argmax())
        if not best:
            return
        left -= float(options[best][0][taken] - options[best][0][chosen[best]])
        chosen[best] = taken
