"""How far softmax may be clipped: gamma from a length, and from the weights that heads put out.

clip((zeta - gamma) p + gamma, 0, 1) makes every weight p up to -gamma / (zeta - gamma) zero. Source: Bondarenko,
Nagel, Blankevoort, "Quantizable Transformers" (arXiv 2306.12929), section 4.1; choosing gamma by what is lost is
ours. Legend: H heads, S queries, T keys, N bins.
"""

import torch
from torch import Tensor

_STEP = 16  # bins per factor e
_LOWEST = -20.0  # ln of the smallest weight that is told apart
BINS = int(-_LOWEST * _STEP)
MOST = 0.03  # the largest -gamma with which the paper trained models well


def gamma_of_length(alpha: float, length: int) -> float:
    """Return gamma = -alpha / T (section 4.1): with alpha 1 a head that looks at T tokens alike is silenced."""
    return -alpha / length if alpha else 0.0


def mass_histogram(weight_HST: Tensor) -> Tensor:
    """Return how much weight lies in each bin of ln p, summed over queries (H, BINS), fp64."""
    position = (weight_HST.log() - _LOWEST) * _STEP
    bin_HST = position.ceil().clamp_(1, BINS).long() - 1  # a bin holds what lies above its lower edge
    found = torch.zeros(len(weight_HST), BINS, dtype=torch.float64, device=weight_HST.device)
    return found.scatter_add_(1, bin_HST.flatten(1), weight_HST.double().flatten(1))


def gammas(mass_HN: Tensor, epsilon: float, zeta: float) -> tuple[Tensor, Tensor]:
    """Return each head's gamma (H,) <= 0 and the share of its weight that it zeroes (H,), at most `epsilon`.

    `mass_HN` is a sum of `mass_histogram`s. The threshold is the largest bin edge that `epsilon` allows, and no
    larger than what makes gamma -MOST; 0 where the first bin is too much.
    """
    share_HN = mass_HN.cumsum(1) / mass_HN.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    edge_N = torch.exp(_LOWEST + torch.arange(1, BINS + 1, dtype=torch.float64) / _STEP)
    allowed_HN = (share_HN <= epsilon) & (edge_N <= MOST / (zeta + MOST))
    count_H = allowed_HN.sum(1)  # shares rise, so what is allowed comes first
    last_H = (count_H - 1).clamp_min(0)
    threshold_H = torch.where(count_H > 0, edge_N[last_H], 0.0)
    removed_H = torch.where(count_H > 0, share_HN.gather(1, last_H[:, None])[:, 0], 0.0)
    return -threshold_H * zeta / (1 - threshold_H), removed_H
