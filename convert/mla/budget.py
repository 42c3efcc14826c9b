"""latent_rank: auto. The rank that a budget allows: of the cache, from sizes; of perplexity, measured.

Measured is the closed form, all layers converted, on the selection text: the refit only makes it better. Where layers
may differ in rank, a cache budget is divided among them by the errors that they make alone.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from reattend.calibration.divided import missing
from reattend.calibration.layerwise import LayerPass
from reattend.calibration.search import fewest, rise, stored_loss, stored_perplexities
from reattend.convert.mla.attention import LatentAttention
from reattend.convert.mla.geometry import Geometry
from reattend.convert.mla.prefix import run_converted
from reattend.errors import DeadEndError
from reattend.transform import Passes, Statistics

RANK_STEP = 16  # of which an automatic rank is a multiple
_TEXT = "selection"
# Converts a layer, which it runs, at a rank.
Convert = Callable[[LayerPass, int], LatentAttention]
# Runs a layer, and measures its closed form at ranks.
ErrorsAt = Callable[[LayerPass, list[int]], Tensor]


def largest_rank(geometry: Geometry, rope_dim: int) -> int:
    """Return the largest rank with which the cache does not grow."""
    return 2 * geometry.kv_heads * geometry.head_dim - rope_dim


def rank_within(cache_budget: float, geometry: Geometry, rope_dim: int) -> int:
    """Return the largest multiple of 16 for which the cache holds this share of its numbers; it may be below 1."""
    numbers = int(cache_budget * 2 * geometry.kv_heads * geometry.head_dim)
    return (numbers - rope_dim) // RANK_STEP * RANK_STEP


def decide_rank(passes: Passes, statistics: Statistics, convert: Convert, most: int, budget: float) -> int:
    """Return the least multiple of 16, up to `most`, that raises perplexity by at most `budget` (relative).

    What was measured is kept in the statistics, `rank-N` (0: the source). Raises `DeadEndError` where none is.
    """

    def loss(rank: int) -> float:
        return stored_loss(statistics, f"rank-{rank}", lambda: _losses(passes, convert, rank))

    def fits(steps: int) -> bool:
        return rise(loss(steps * RANK_STEP), loss(0)) <= budget

    steps = most // RANK_STEP
    if not fits(steps):
        raise DeadEndError(
            f"mla: perplexity_budget: {budget} is not met by latent_rank {steps * RANK_STEP}, the largest; "
            "raise it or rope_dim"
        )
    return fewest(1, steps, fits) * RANK_STEP


def divide_ranks(passes: Passes, statistics: Statistics, errors_at: ErrorsAt, most: int, mean: int) -> list[int]:
    """Return every layer's rank, multiples of 16 up to `most` whose mean is `mean`, by the errors of `errors_at`.

    What was measured is kept in the statistics, `errors-N` per layer.
    """
    steps = _measured_steps(most // RANK_STEP)
    for layer in passes(_TEXT):
        if missing(statistics, f"errors-{layer.index}"):
            statistics[f"errors-{layer.index}"] = {"errors": errors_at(layer, [step * RANK_STEP for step in steps])}
    count = sum(1 for name in statistics if name.startswith("errors-"))
    errors_YK = [_between(steps, statistics[f"errors-{i}"]["errors"].tolist()) for i in range(count)]
    return [given * RANK_STEP for given in divide(errors_YK, mean // RANK_STEP * count)]


def _measured_steps(most: int) -> list[int]:
    """Return powers of two below `most`, and `most`."""
    return [*(2**n for n in range(most.bit_length()) if 2**n < most), most]


def _between(steps: Sequence[int], errors: Sequence[float]) -> list[float]:
    """Return the errors at every step up to the last, logarithms linear between those that were measured."""
    logs = [math.log(max(error, 1e-30)) for error in errors]
    found = [errors[0]]
    for (low, first), (high, last) in pairwise(zip(steps, logs, strict=True)):
        found += [math.exp(first + (last - first) * n / (high - low)) for n in range(1, high - low + 1)]
    return found


def divide(errors_YK: Sequence[Sequence[float]], steps: int) -> list[int]:
    """Return how many of `steps` each layer gets, at least 1, so that the sum of errors is least.

    `errors_YK[y][k - 1]` is the error of layer y with k steps. Each turn goes to the layer that gains most per step,
    by any number of steps at once: measured errors are not always convex.
    """
    given, left = [1] * len(errors_YK), steps - len(errors_YK)

    def gain(layer: int, more: int) -> float:
        row, now = errors_YK[layer], given[layer]
        return (row[now - 1] - row[now - 1 + more]) / more

    while left > 0:
        most = [min(left, len(row) - given[layer]) for layer, row in enumerate(errors_YK)]
        turns = [(layer, more) for layer, room in enumerate(most) for more in range(1, room + 1)]
        layer, more = max(turns, key=lambda turn: gain(*turn))
        given[layer] += more
        left -= more
    return given


def _losses(passes: Passes, convert: Convert, rank: int) -> Tensor:
    """The windows' losses with all layers converted at a rank, or with none for 0."""
    converted: Tensor | None = None
    for layer in passes(_TEXT):
        states = layer.hidden[_TEXT]  # what the last layer puts out, in the end
        if rank:
            converted = states.clone() if converted is None else converted
            run_converted(layer, convert(layer, rank), converted)
    return passes.losses(_TEXT, states if converted is None else converted)


def rank_findings(statistics: Statistics) -> dict[str, Any]:
    """Return the rank, or one per layer, and the perplexities of the selection text that decided on it, by rank."""
    found: dict[str, Any] = {"latent_rank": statistics["rank"]["latent_rank"].tolist()}
    measured = stored_perplexities(statistics, "rank-")
    if measured:
        names = {rank: f"closed form, {rank}" if rank else "source" for rank in measured}
        found["selection_perplexity"] = {names[rank]: perplexity for rank, perplexity in measured.items()}
    return found
