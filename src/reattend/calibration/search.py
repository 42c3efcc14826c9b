"""Searches on measured losses."""

import math
from collections.abc import Callable, Mapping, MutableMapping

from torch import Tensor

from reattend.calibration.divided import missing
from reattend.errors import BadNumbersError


def stored_loss(
    statistics: MutableMapping[str, dict[str, Tensor]], name: str, measure: Callable[[], Tensor]
) -> float:
    """Return a mean over windows, measured (W,) where the statistics don't hold it under `name` yet.

    Raises `BadNumbersError` where it is no number.
    """
    if missing(statistics, name):
        statistics[name] = {"losses": measure()}
    loss = float(statistics[name]["losses"].mean())
    if not math.isfinite(loss):
        where = "its last norm or its head holds NaN or inf, or logits overflow"
        raise BadNumbersError(f"the model's loss on the selection text is {loss}: {where}")
    return loss


def stored_perplexities(statistics: Mapping[str, dict[str, Tensor]], prefix: str) -> dict[int, float]:
    """Return the perplexities whose losses `stored_loss` put under `prefix` and a number, by number, ascending."""
    numbers = sorted(int(name.removeprefix(prefix)) for name in statistics if name.startswith(prefix))
    losses = {number: float(statistics[f"{prefix}{number}"]["losses"].mean().exp()) for number in numbers}
    return {number: float(f"{value:.6g}") for number, value in losses.items()}


def rise(loss: float, base: float) -> float:
    """Return the relative rise of perplexity between two losses in nats."""
    return math.expm1(loss - base)


def fewest(least: int, most: int, fits: Callable[[int], bool]) -> int:
    """Return the least count from `least` that fits, bisected; `most` fits, as does more than what fits."""
    if fits(least):
        return least
    low, high = least, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
