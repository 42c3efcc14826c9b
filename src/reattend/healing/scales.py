"""Learning rates relative to the size of what is trained: surgery leaves rows of very different sizes behind.

A step trains u with p = s u, s a power of two for each row of a matrix: so u has rows of root mean square 0.7 to 1.4,
and dividing and multiplying by s is exact. (The latent rows of an `mla` output are 1e-7 large and the norm behind
them 4e3, beside rope rows of usual size in the same matrix: one rate for all would destroy the former.)
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from reattend.healing.splitting import local, split_like, whole


def scale_of(value: Tensor) -> Tensor:
    """Return s (rows, 1, ..) of a matrix, or (n,) of a vector, which has one for all: 2^round(log2 rms).

    A row of zeros takes the least of the others; where all are zeros it is 1.
    """
    rows = value.double().reshape(len(value) if value.ndim > 1 else 1, -1)
    rms = rows.square().mean(1).sqrt()
    known = rms[rms > 0]
    rms = torch.where(rms > 0, rms, known.min() if len(known) else torch.ones_like(rms))
    scale = torch.exp2(rms.log2().round()).to(value.dtype)
    return scale.view(-1, *[1] * (value.ndim - 1)) if value.ndim > 1 else scale.expand_as(value).clone()


def scales_of(parameters: Mapping[str, nn.Parameter], every: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the part of each parameter's scale that this process needs; all processes must call it.

    A bias has the scale of its weight's rows, as the two add up; `every` holds the weights that are not trained too.
    """
    found = {}
    for name, parameter in parameters.items():
        like = every.get(f"{name.removesuffix('bias')}weight", parameter) if name.endswith("bias") else parameter
        scale = scale_of(whole(like.detach()))
        if parameter.ndim < like.ndim:
            scale = scale.flatten() if len(scale) == len(parameter) else scale_of(whole(parameter.detach()))
        found[name] = split_like(scale, parameter)
    return found


class Scaled:
    """Parameters p = s u by name, with their scales s, and the gradients of u."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], scales: Mapping[str, Tensor]) -> None:
        self._pairs = [(parameter, scales[name]) for name, parameter in parameters.items()]

    def gradients(self) -> list[Tensor]:
        """Turn the gradients into those of u, once per step; return this process's parts of them."""
        found = []
        for parameter, scale in self._pairs:
            if parameter.grad is not None:
                found.append(local(parameter.grad).mul_(scale))
        return found

    @contextmanager
    def divided(self) -> Iterator[None]:
        """Let parameters with a gradient hold u for a while."""
        moved = [(local(p.data), scale) for p, scale in self._pairs if p.grad is not None]
        for data, scale in moved:
            data.div_(scale)
        try:
            yield
        finally:
            for data, scale in moved:
                data.mul_(scale)
