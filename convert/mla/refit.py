"""Layer-wise refit: the converted attention is fitted to the source layer's attention output on given inputs.

Inputs and targets are the source model's, so layers are independent and nothing is propagated through the
model. The loss is `output_error`: per token and normalised. Memory: one layer, its Adam state, one batch.

Legend: B batch, T tokens, E hidden.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from reattend.convert.mla.attention import LatentAttention, output_error

Batch = Callable[[int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Schedule:
    """Adam with a cosine from `rate` to 0, after `warmup` steps of a linear rise.

    Adam's first steps have full size in every number and throw a converted layer off; four times the rate
    does not recover from them in a few dozen steps.
    """

    steps: int = 40
    rate: float = 1.5e-4
    betas: tuple[float, float] = (0.9, 0.98)
    warmup: int = 6

    def rate_at(self, step: int) -> float:
        """Return the rate of one step."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        return self.rate * rise * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def balance_latent(layer: LatentAttention) -> LatentAttention:
    """Scale each latent channel so that what writes it and what reads it have the same root mean square.

    The function is the same. Adam's steps have one size for all numbers, and the closed form's channels span
    orders of magnitude.
    """
    rank = layer.latent_rank
    wide = layer.down_CE.double()
    write_L = wide[:rank].square().mean(1).sqrt()
    read = torch.cat([layer.key_HNL, layer.value_HVL], 1).double().flatten(0, 1)
    factor_L = (read.square().mean(0).sqrt() / write_L.clamp(min=1e-30)).sqrt()
    factor_L = torch.where(factor_L > 0, factor_L, torch.ones_like(factor_L))
    factor_C = torch.cat([factor_L, torch.ones(layer.rope_dim, dtype=torch.float64)])
    bias_C = None if layer.down_bias_C is None else (layer.down_bias_C.double() * factor_C).to(layer.down_CE.dtype)
    return replace(
        layer,
        down_CE=(wide * factor_C[:, None]).to(layer.down_CE.dtype),
        down_bias_C=bias_C,
        key_HNL=(layer.key_HNL.double() / factor_L).to(layer.key_HNL.dtype),
        value_HVL=(layer.value_HVL.double() / factor_L).to(layer.value_HVL.dtype),
    )


def refit(layer: LatentAttention, batch: Batch, schedule: Schedule) -> tuple[LatentAttention, list[float]]:
    """Fit all tensors of `layer` in fp32; `batch(step)` gives inputs and source outputs, both (B, T, E).

    Returns the fitted layer and the loss before each step. A step whose loss is not finite raises
    `FloatingPointError`.
    """
    start = balance_latent(layer).to(torch.float32)
    fitted = {name: value.clone().requires_grad_() for name, value in start.tensors().items()}
    changed: dict[str, Any] = dict(fitted)
    trained = replace(start, **changed)
    adam = torch.optim.Adam(fitted.values(), lr=schedule.rate, betas=schedule.betas)
    losses = []
    for step in range(schedule.steps):
        for group in adam.param_groups:
            group["lr"] = schedule.rate_at(step)
        x_BTE, target_BTE = batch(step)
        loss = output_error(trained.attend(x_BTE), target_BTE)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"refit: the loss at step {step} is {losses[-1]}")
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
    done: dict[str, Any] = {name: value.detach() for name, value in fitted.items()}
    return replace(start, **done), losses
