"""Which pairs keep RoPE, in one layer and in one list of frequencies for a whole model.

Dropping RoPE from component n replaces exp(i w d) by 1 at every distance d; rotating it at another frequency
w' by exp(i w' d). The score's mean square error is about energy_n x (1 - c^2), c the mean cosine of
(w - w') d over the attention's distances.

Legend: N components, P pairs that keep RoPE, F source frequencies, Y layers, S slots of the list.
"""

import torch
from torch import Tensor

from reattend.convert.mla.rotation import Components


def leading(components: Components, num_kv_heads: int) -> Tensor:
    """Return the first component of every frequency, as published (P = F)."""
    return torch.arange(0, len(components.energy_N), num_kv_heads)


def drop_cost(components: Components, cosine_F: Tensor) -> Tensor:
    """Return energy x (1 - c^2) per component (N,)."""
    return components.energy_N * (1 - cosine_F[components.frequency_N] ** 2)


def strongest(cost_N: Tensor, count: int) -> Tensor:
    """Return the `count` components that cost most to drop, ascending by index."""
    return cost_N.topk(count).indices.sort().values


def by_counts(components: Components, count_F: Tensor) -> Tensor:
    """Return the leading count_F[f] components of each frequency, ascending by frequency."""
    frequency_N = components.frequency_N
    rank_N = torch.zeros_like(frequency_N)
    for f in range(len(count_F)):
        mine = (frequency_N == f).nonzero()[:, 0]
        order = components.energy_N[mine].argsort(descending=True, stable=True)
        rank_N[mine[order]] = torch.arange(len(mine))
    return (rank_N < count_F[frequency_N]).nonzero()[:, 0]


def common_counts(cost_YFC: Tensor, slots: int, power: float) -> Tensor:
    """Return how often each frequency (F,) is in a list of `slots` pairs for all layers.

    `cost_YFC` (layers, F, G) holds each layer's cost of dropping component c of frequency f, descending in c.
    Greedy: each slot goes where the sum over layers of (cost still dropped)^power falls most. A power above 1
    looks at the worst layers first.
    """
    cost_YFC = cost_YFC.double()
    count_F = torch.zeros(cost_YFC.shape[1], dtype=torch.long)
    left_Y = cost_YFC.sum((1, 2))
    padded = torch.nn.functional.pad(cost_YFC, (0, 1))
    for _ in range(slots):
        saved_YF = padded.gather(2, count_F.view(1, -1, 1).expand(len(padded), -1, 1))[..., 0]
        after_F = (left_Y[:, None] - saved_YF).clamp(min=0).pow(power).sum(0)
        after_F[count_F >= cost_YFC.shape[2]] = torch.inf
        f = int(after_F.argmin())
        left_Y = left_Y - saved_YF[:, f]
        count_F[f] += 1
    return count_F
