"""The losses, each a mean over the tokens of every window: (B,), in fp32 or the inputs' fp64.

Means per window, not per micro-batch, so that their sum over any split of a batch is the same.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def kl_divergence(student_BTV: Tensor, teacher_BTV: Tensor, temperature: float = 1.0) -> Tensor:
    """Return KL(teacher || student) of the next-token distributions, nats per token, times temperature^2.

    The square keeps the gradient's size (Hinton et al. 2015, section 2).
    """
    ours, theirs = (_log_probs(logits / temperature) for logits in (student_BTV, teacher_BTV))
    return temperature**2 * (theirs.exp() * (theirs - ours)).sum(-1).mean(-1)


def next_token_loss(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Return -log p of `ids`, which are what follows each position, nats per token."""
    return -_log_probs(logits_BTV).gather(-1, ids_BT[..., None])[..., 0].mean(-1)


def relative_error(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return |h - h'|^2 / |h'|^2, each token's own, as a mean over layers and tokens; inputs (B, T, E) per layer.

    Relative per token: the few tokens with massive activations would else be all that counts.
    """
    errors = [_relative(_wide(ours), _wide(theirs)) for ours, theirs in zip(student, teacher, strict=True)]
    return torch.stack(errors).mean(0)


def outlier_excess(outputs: Sequence[Tensor], limit: float) -> Tensor:
    """Return relu(max|x| / limit - 1)^2, each token's own, as a mean over `outputs` (B, T, E) and tokens.

    Bounds what attention and FFN write into the residual stream, as the penalty on FFN outputs in Bondarenko et al.
    2023, "Quantizable Transformers", B.6, does; that one is the plain mean square.
    """
    peaks = torch.stack([_wide(output).abs().amax(-1) for output in outputs])
    return (peaks / limit - 1).relu().square().mean((0, -1))


def _relative(ours_BTE: Tensor, theirs_BTE: Tensor) -> Tensor:
    scale = theirs_BTE.square().sum(-1).clamp_min(torch.finfo(theirs_BTE.dtype).tiny)
    return ((ours_BTE - theirs_BTE).square().sum(-1) / scale).mean(-1)


def _log_probs(logits: Tensor) -> Tensor:
    return torch.log_softmax(_wide(logits), -1)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
