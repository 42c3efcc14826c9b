"""Layer-wise refit: the converted attention is fitted to the source layer's attention output on given inputs.

What inputs and targets are is the caller's choice (`prefix`); nothing is propagated back through the model. Three
stages, all on the loss `output_error` (per token and normalised): `fit_output` solves o_proj, momentum steps change
all matrices (biases stay), `fit_output` again. Memory: one layer, one batch.

Legend: W windows, T tokens, E hidden; as in `attention` otherwise.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from reattend.calibration.fitting import Schedule, output_error, solve_linear
from reattend.calibration.orthogonal import OrthogonalMomentum
from reattend.convert.mla.attention import LatentAttention
from reattend.convert.mla.balance import balance


def refit(
    layer: LatentAttention, x_WTE: Tensor, source_WTE: Tensor, schedule: Schedule
) -> tuple[LatentAttention, list[float]]:
    """Fit the layer, in fp32, to the source's outputs for the inputs `x_WTE`; windows are taken in turn.

    Returns the fitted layer and the loss before each step. Numbers that are not finite raise
    `FloatingPointError`.
    """
    start = fit_output(balance(layer).to(torch.float32), x_WTE, source_WTE)
    matrices = {name: value.clone().requires_grad_() for name, value in _matrices(start).items()}
    descent = OrthogonalMomentum(matrices.values())
    losses = []
    for step in range(schedule.steps):
        taken = torch.arange(step * schedule.windows, (step + 1) * schedule.windows) % len(x_WTE)
        loss = output_error(_with(start, matrices).attend(x_WTE[taken]), source_WTE[taken])
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"refit: the loss at step {step} is {losses[-1]}")
        loss.backward()  # type: ignore[no-untyped-call]
        descent.step(schedule.rate_at(step))
    fitted = _with(start, {name: value.detach() for name, value in matrices.items()})
    return fit_output(fitted, x_WTE, source_WTE), losses


def _matrices(layer: LatentAttention) -> dict[str, Tensor]:
    """Split a layer into matrices, or batches of one per head, that each do one thing."""
    free, rank = layer.key_HNL.shape[1], layer.latent_rank
    return {
        "query_free_HNE": layer.query_HQE[:, :free],
        "query_rope_HRE": layer.query_HQE[:, free:],
        "latent_LE": layer.down_CE[:rank],
        "rope_RE": layer.down_CE[rank:],
        "key_HNL": layer.key_HNL,
        "value_HVL": layer.value_HVL,
        "output_HEV": layer.output_EHV.transpose(0, 1),
    }


def _with(layer: LatentAttention, matrices: dict[str, Tensor]) -> LatentAttention:
    """Undo `_matrices`; biases are those of `layer`."""
    return replace(
        layer,
        query_HQE=torch.cat([matrices["query_free_HNE"], matrices["query_rope_HRE"]], 1),
        down_CE=torch.cat([matrices["latent_LE"], matrices["rope_RE"]]),
        key_HNL=matrices["key_HNL"],
        value_HVL=matrices["value_HVL"],
        output_EHV=matrices["output_HEV"].transpose(0, 1),
    )


def fit_output(layer: LatentAttention, x_WTE: Tensor, source_WTE: Tensor) -> LatentAttention:
    """Solve o_proj (and its bias, if there is one) by least squares, everything else as it is.

    The ridge pulls to the present matrix. Raises `FloatingPointError` where sums are not finite.
    """
    weight_ED = layer.output_EHV.flatten(1)
    columns = [weight_ED] if layer.output_bias_E is None else [weight_ED, layer.output_bias_E[:, None]]
    now_ED = torch.cat(columns, 1)

    def seen() -> Iterator[tuple[Tensor, Tensor]]:
        for x_TE, source_TE in zip(x_WTE, source_WTE, strict=True):
            with torch.inference_mode():
                read_TD = layer.mix(x_TE[None])[0].transpose(0, 1).flatten(1)
                yield torch.nn.functional.pad(read_TD, (0, now_ED.shape[1] - read_TD.shape[1]), value=1.0), source_TE

    solved_ED = solve_linear(now_ED, seen())
    changed: dict[str, Any] = {"output_EHV": solved_ED[:, : weight_ED.shape[1]].reshape(layer.output_EHV.shape)}
    if layer.output_bias_E is not None:
        changed["output_bias_E"] = solved_ED[:, -1].clone()
    return replace(layer, **changed)
