"""Causal attention, and its gradient for CPUs in fp32.

The fused CPU kernel wants values as wide as queries, and computes the scores again in its backward pass. Here
the softmax weights of a step are kept instead (about B H T^2 / 2 numbers), block of rows by block of rows, so
that the half above the diagonal is never computed.

Legend: B batch, H heads, T tokens, Q query numbers, V value numbers.
"""

from typing import Any

import torch
from torch import Tensor

_ROWS = 128  # the fastest of 64, 128, 256 and 512 at 1024 tokens on two cores


def causal_attention(
    q_BHTQ: Tensor, k_BHTQ: Tensor, v_BHTV: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """Return softmax(scale q k^T) v under a causal mask, (B, H, T, V); a token sees `window` tokens (None: all)."""
    tokens = q_BHTQ.shape[-2]
    if window is not None and window < tokens:
        seen = torch.ones(tokens, tokens, dtype=torch.bool, device=q_BHTQ.device).tril()
        return torch.nn.functional.scaled_dot_product_attention(
            q_BHTQ, k_BHTQ, v_BHTV, attn_mask=seen.triu(1 - window), scale=scale
        )
    if torch.is_grad_enabled() and q_BHTQ.requires_grad and q_BHTQ.device.type == "cpu":
        out: Tensor = _Blocks.apply(q_BHTQ, k_BHTQ, v_BHTV, scale)  # type: ignore[no-untyped-call]
        return out
    pad = q_BHTQ.shape[-1] - v_BHTV.shape[-1]
    # Kernels that never build the (T, T) matrix want equal widths.
    wide = torch.nn.functional.pad(v_BHTV, (0, pad)) if pad > 0 else v_BHTV
    mixed = torch.nn.functional.scaled_dot_product_attention(q_BHTQ, k_BHTQ, wide, is_causal=True, scale=scale)
    return mixed[..., : v_BHTV.shape[-1]]


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BHTQ: Tensor, k_BHTQ: Tensor, v_BHTV: Tensor, scale: float) -> Tensor:
        tokens = q_BHTQ.shape[-2]
        q_BHTQ = q_BHTQ * scale
        outputs, weights = [], []
        for start in range(0, tokens, _ROWS):
            end = min(start + _ROWS, tokens)
            score = q_BHTQ[..., start:end, :] @ k_BHTQ[..., :end, :].transpose(-1, -2)
            later = torch.ones(end - start, end - start, dtype=torch.bool, device=score.device).triu_(1)
            score[..., start:].masked_fill_(later, -torch.inf)
            weights.append(score.softmax(-1))
            outputs.append(weights[-1] @ v_BHTV[..., :end, :])
        out_BHTV = torch.cat(outputs, -2)
        ctx.scale = scale
        ctx.save_for_backward(q_BHTQ, k_BHTQ, v_BHTV, out_BHTV, *weights)
        return out_BHTV

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        q_BHTQ, k_BHTQ, v_BHTV, out_BHTV, *weights = ctx.saved_tensors
        (grad_BHTV,) = gradients
        dq, dk, dv = torch.empty_like(q_BHTQ), torch.zeros_like(k_BHTQ), torch.zeros_like(v_BHTV)
        row_BHT1 = (grad_BHTV * out_BHTV).sum(-1, keepdim=True)
        for start, weight in zip(range(0, len(weights) * _ROWS, _ROWS), weights, strict=True):
            end = weight.shape[-1]
            grad = grad_BHTV[..., start:end, :]
            dv[..., :end, :] += weight.transpose(-1, -2) @ grad
            score = grad @ v_BHTV[..., :end, :].transpose(-1, -2)
            score.sub_(row_BHT1[..., start:end, :]).mul_(weight)
            dq[..., start:end, :] = score @ k_BHTQ[..., :end, :]
            dk[..., :end, :] += score.transpose(-1, -2) @ q_BHTQ[..., start:end, :]
        return dq * ctx.scale, dk, dv, None
