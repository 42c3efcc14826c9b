"""Window losses as perplexities, with their errors."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from reattend.errors import Failure

_MOST_NATS = 700.0  # its exponential is near the largest double


def nll_of(log_probs: Tensor, tokens: Tensor) -> float:
    """Return the mean negative log likelihood in nats of `tokens` (1, T) by log probabilities (T - 1, vocabulary)."""
    return float(-log_probs.gather(-1, tokens[0, 1:, None]).double().mean())


def perplexity_of(name: str, nlls: Sequence[float]) -> tuple[float, float | None]:
    """Return the perplexity of windows' mean losses in nats, and its standard error, None for a single window.

    Raises `Failure`, naming what was measured, where that is no number.
    """
    means = torch.tensor(nlls, dtype=torch.float64)
    mean = float(means.mean())
    if not math.isfinite(mean):
        raise Failure(f"{name}: the mean loss is {mean}")
    if mean > _MOST_NATS:
        raise Failure(f"{name}: the mean loss is {mean:.5g} nats, too much for a perplexity")
    return math.exp(mean), stderr(math.exp(mean) * means)


def stderr(values: Tensor) -> float | None:
    """Return the standard error of the mean of `values` (N,), None for a single one."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None
