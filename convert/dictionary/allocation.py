"""Ranks for many matrices within one budget of numbers: each at the same price.

A matrix of M x N at rank R takes R (M + N) numbers; where that is no less than M N it stays whole.
"""

from collections.abc import Mapping
from dataclasses import dataclass

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

    @property
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


def allocate(curves: Mapping[str, Curve], budget: int) -> dict[str, int | None]:
    """Return each matrix's rank, or None for whole, with the least sum of errors within `budget` numbers.

    One price for all numbers (a Lagrange multiplier) is bisected: each matrix takes the choice of the least error
    plus price. What is left then goes where a number gains most. Raises `ValueError` for a budget that does not give
    each matrix rank 1.
    """
    options = {name: curve.options for name, curve in curves.items()}

    def take(price: float) -> dict[str, int]:
        return {name: int((error + price * cost).argmin()) for name, (cost, error) in options.items()}

    def spent(chosen: Mapping[str, int]) -> float:
        return sum(float(options[name][0][choice]) for name, choice in chosen.items())

    least = sum(float(cost[0]) for cost, _ in options.values())
    if least > budget:
        raise ValueError(f"{least:.0f} numbers are the least, {budget} may be kept")
    if spent(chosen := take(0.0)) > budget:
        low, high = 0.0, max(float(error[0]) for _, error in options.values()) + 1e-300
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (low, middle) if spent(take(middle)) <= budget else (middle, high)
        chosen = take(high)
        _fill(options, chosen, budget - spent(chosen))
    return {name: curves[name].rank(choice) for name, choice in chosen.items()}


def _fill(options: Mapping[str, tuple[Tensor, Tensor]], chosen: dict[str, int], left: float) -> None:
    """Spend what a price left over: again and again on the choice that gains most per number."""
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
