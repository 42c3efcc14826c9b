"""The route in torch's matrix products: heads of one group read its keys and values together."""

import torch
from torch import Tensor


def lead(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output (B, H, 1, V), scores (B, H, T) and log-sum-exp (B, H)."""
    batch, heads, _, width = query.shape
    groups, tokens = key.shape[1:3]
    dtype = _exact(query.dtype)
    score = torch.matmul(query.reshape(batch, groups, heads // groups, width).to(dtype) * scale, key.to(dtype).mT)
    score = score.view(batch, heads, tokens)
    if mask is not None:
        score = score.masked_fill(~mask.expand(batch, heads, 1, tokens)[:, :, 0], -torch.inf)
    lse = score.logsumexp(-1)
    return follow(score, lse, value), score, lse


def follow(score: Tensor, lse: Tensor, value: Tensor) -> Tensor:
    """Return the weights times values (B, H, 1, V)."""
    batch, heads, tokens = score.shape
    groups = value.shape[1]
    # Products of 16 bit are many times slower than a cast and fp32 ones on CPUs without units for them.
    dtype = value.dtype if value.is_cuda else _exact(value.dtype)
    weight = torch.exp(score - lse.clamp_min(torch.finfo(lse.dtype).min)[..., None])
    found = torch.matmul(weight.view(batch, groups, heads // groups, tokens).to(dtype), value.to(dtype))
    return found.view(batch, heads, 1, -1).to(value.dtype)


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
