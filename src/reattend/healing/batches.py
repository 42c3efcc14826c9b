"""Which windows make up a step: a function of seed and step, so that resuming and several processes agree."""

import math
from functools import lru_cache

import torch
from torch import Tensor

_PRIME = 1_000_003


def batch_of(step: int, batch: int, windows: int, seed: int) -> list[int]:
    """Return the numbers of the `batch` windows of a step, of `windows` in all; each is used once per epoch."""
    places = (divmod(step * batch + i, windows) for i in range(batch))
    return [int(_order(windows, seed, epoch)[place]) for epoch, place in places]


@lru_cache(maxsize=4)
def _order(windows: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed * _PRIME + epoch) % 2**63)
    return torch.randperm(windows, generator=generator)


def share(numbers: list[int], rank: int, processes: int, micro_batch: int) -> list[list[int]]:
    """Return what one of the processes takes of a step, as micro-batches: as many in every process."""
    mine = numbers[rank::processes]
    return [mine[start : start + micro_batch] for start in range(0, len(mine), micro_batch)]


def rate(step: int, start: int, steps: int, warmup: int) -> float:
    """Return the share of the largest learning rate at a step: linear warm-up from `start`, then a cosine to 0.

    The first step has 1 / warmup, the last one more than 0; before `start` it is 0.
    """
    since, total = step - start, steps - start
    if since < 0:
        return 0.0
    if since < warmup:
        return (since + 1) / warmup
    part = (since - warmup) / max(1, total - warmup)
    return 0.5 * (1 + math.cos(math.pi * part))
