"""Attention of few queries over cached MLA rows, in the absorbed form: the rows are read once for all heads."""

import torch
from torch import Tensor

__all__ = ["mla_decode"]


def mla_decode(
    query_latent: Tensor,
    query_rope: Tensor,
    latent: Tensor,
    rope: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Return softmax(scale (query_latent latent^T + query_rope rope^T), masked) latent.

        query_latent (B, H, S, L)  queries of H heads, taken into the latent space
        query_rope   (B, H, S, R)  their rotary part, rotated
        latent       (B, T, L)     what is cached per token; last dimension contiguous
        rope         (B, T, R)
        mask         (B or 1, 1, S, T), bool (true where a query sees a token) or numbers to add
        returns      (B, H, S, L)

    `scale` is that of the expanded form, (nope + rope)^-1/2. Scores of half types go through a softmax in fp32.
    Differentiable. Raises `ValueError` for shapes that do not fit.
    """
    _check(query_latent, query_rope, latent, rope, mask)
    batch, heads, queries, rank = query_latent.shape
    # All heads and queries are rows of one product per sequence: keys are common to them.
    score = torch.bmm(query_latent.reshape(batch, -1, rank), latent.transpose(1, 2))
    score = score.baddbmm_(
        query_rope.reshape(batch, heads * queries, -1), rope.transpose(1, 2), beta=scale, alpha=scale
    )
    if mask is not None:
        _mask(score.view(batch, heads, queries, -1), mask)
    half = score.dtype in (torch.float16, torch.bfloat16)
    weight = score.softmax(-1, dtype=torch.float32 if half else None).to(score.dtype)
    return torch.bmm(weight, latent).view(batch, heads, queries, rank)


def _mask(score_BHST: Tensor, mask: Tensor) -> None:
    """Mask in place; the least number instead of -inf, so that a query that sees nothing gives no NaN."""
    if mask.dtype == torch.bool:
        score_BHST.masked_fill_(~mask, torch.finfo(score_BHST.dtype).min)
    else:
        score_BHST.add_(mask)


def _check(query_latent: Tensor, query_rope: Tensor, latent: Tensor, rope: Tensor, mask: Tensor | None) -> None:
    batch, _, queries, rank = query_latent.shape
    tokens = latent.shape[1]
    if query_rope.shape[:3] != query_latent.shape[:3]:
        raise ValueError(f"mla_decode: queries {tuple(query_latent.shape)} and {tuple(query_rope.shape)} do not fit")
    if latent.shape != (batch, tokens, rank) or rope.shape != (batch, tokens, query_rope.shape[-1]):
        raise ValueError(f"mla_decode: rows {tuple(latent.shape)} and {tuple(rope.shape)} do not fit the queries")
    if mask is not None and (mask.dim() != 4 or mask.shape[2:] != (queries, tokens)):
        raise ValueError(f"mla_decode: mask {tuple(mask.shape)} is not (.., .., {queries}, {tokens})")
