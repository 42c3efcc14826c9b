"""Blocks of layers whose outputs differ little: the rule by KL divergence (MASA, arXiv 2508.04581, section 3.3).

The paper names neither the direction of the divergence nor how it cuts. Here it is KL(p_l || p_l+1), of what the
model's final norm and head make of each layer's mean hidden state, and the cut is the best for a number of blocks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from reattend.calibration.layerwise import LayerPass


def mean_state(layer: LayerPass) -> Tensor:
    """Return the mean of what a layer was fed, or, once it ran, put out, on the calibration text: (E,), fp64."""
    return layer.hidden["calibration"].double().mean((0, 1))


def found_blocks(logits_LV: Tensor, size: int) -> dict[str, Tensor]:
    """Return `first`, the first layers of as many blocks as there are of `size` layers, and `drift` (L - 1,)."""
    drift = divergences(logits_LV)
    return {"first": torch.tensor(first_layers(drift.tolist(), -(-len(logits_LV) // size), 2 * size)), "drift": drift}


def divergences(logits_LV: Tensor) -> Tensor:
    """Return KL(p_l || p_l+1) in nats (L - 1,), fp64."""
    logs = torch.log_softmax(logits_LV.double(), -1)
    return (logs[:-1].exp() * (logs[:-1] - logs[1:])).sum(-1)


def first_layers(drift: Sequence[float], blocks: int, longest: int) -> tuple[int, ...]:
    """Return the first layer of each of `blocks` runs of at most `longest` layers with the least drift within them.

    `drift` (L - 1,) is what lies between two layers. By dynamic programming: exact.
    """
    layers = len(drift) + 1
    # best[end]: the least drift within runs that cover layers before `end`, and where these runs begin.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for _ in range(blocks):
        found: dict[int, tuple[float, tuple[int, ...]]] = {}
        for first, (total, before) in best.items():
            for end in range(first + 1, min(first + longest, layers) + 1):
                candidate = (total + sum(drift[first : end - 1]), (*before, first))
                found[end] = min(found.get(end, candidate), candidate)
        best = found
    return best[layers][1]
