"""Attention in plain torch: what the kernels are tested against. fp64 for fp64 inputs, else fp32; differentiable.

Legend: as in `options`; P query heads per key head.
"""

import torch
from torch import Tensor

from reattend.kernels.attention.options import Options


def attention(query_BHSD: Tensor, key_BGTD: Tensor, value_BGTV: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, S, V) and the log-sum-exp (B, H, S), in the dtype that was computed in."""
    dtype = torch.float64 if query_BHSD.dtype == torch.float64 else torch.float32
    weight_BHST, lse_BHS = weights(scores(query_BHSD, key_BGTD, options, dtype), options)
    return mix(weight_BHST, value_BGTV), lse_BHS


def weights(score_BHST: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Return what scores become (B, H, S, T), 0 where they are -inf, and their log-sum-exp (B, H, S)."""
    lse_BHS = torch.logsumexp(score_BHST, -1)
    if options.sinks is not None:
        lse_BHS = torch.logaddexp(lse_BHS, options.sinks.to(score_BHST.dtype)[:, None])
    # An empty row's -inf would make NaN of -inf - -inf.
    floor_BHS = torch.where(torch.isinf(lse_BHS), 0.0, lse_BHS)
    return _clipped(torch.exp(score_BHST - floor_BHS[..., None]), options), lse_BHS


def scores(query_BHSD: Tensor, key_BGTD: Tensor, options: Options, dtype: torch.dtype) -> Tensor:
    """Return scores (B, H, S, T), -inf where a query doesn't see a key."""
    batch, heads, queries, width = query_BHSD.shape
    groups, tokens = key_BGTD.shape[1:3]
    grouped = query_BHSD.to(dtype).reshape(batch, groups, heads // groups, queries, width)
    product = torch.einsum("bgpsd,bgtd->bgpst", grouped, key_BGTD.to(dtype))
    score_BHST = product.reshape(batch, heads, queries, tokens) * options.scale_for(width)
    if options.softcap is not None:
        score_BHST = options.softcap * torch.tanh(score_BHST / options.softcap)
    distance_BST = _distance(options, key_BGTD, queries)
    if options.slopes is not None:
        score_BHST = score_BHST - options.slopes.to(dtype)[:, None, None] * distance_BST[:, None].abs()
    return score_BHST.masked_fill(~visible(options, key_BGTD, queries), -torch.inf)


def _distance(options: Options, key_BGTD: Tensor, queries: int) -> Tensor:
    """Return how far each key lies behind each query (B, S, T); negative: before it."""
    ranges_B3 = options.ranges_for(key_BGTD, queries)
    position_BS = ranges_B3[:, 2:] + torch.arange(queries, device=key_BGTD.device)
    return position_BS[..., None] - torch.arange(key_BGTD.shape[2], device=key_BGTD.device)


def visible(options: Options, key_BGTD: Tensor, queries: int) -> Tensor:
    """Return (B, 1 or H, S, T), true where a query sees a key."""
    ranges_B3 = options.ranges_for(key_BGTD, queries)
    token_T = torch.arange(key_BGTD.shape[2], device=key_BGTD.device)
    seen_BT = (token_T >= ranges_B3[:, :1]) & (token_T < ranges_B3[:, 1:2])
    seen_BST = seen_BT[:, None].expand(-1, queries, -1)
    distance_BST = _distance(options, key_BGTD, queries)
    if options.causal:
        seen_BST = seen_BST & (distance_BST >= 0)
    if options.window is not None:
        seen_BST = seen_BST & (distance_BST < options.window)
    seen = seen_BST[:, None]
    return seen if options.mask is None else seen & options.mask


def _clipped(weight_BHST: Tensor, options: Options) -> Tensor:
    """Stretch and clip weights: zeros stay zeros, also those of keys that are not seen, as gamma <= 0."""
    if not options.is_clipped:
        return weight_BHST
    gamma = 0.0 if options.gamma is None else options.gamma.to(weight_BHST.dtype)[:, None, None]
    return ((options.zeta - gamma) * weight_BHST + gamma).clamp(0, 1)


def mix(weight_BHST: Tensor, value_BGTV: Tensor) -> Tensor:
    """Return the weighted sum of values (B, H, S, V)."""
    batch, heads, queries, tokens = weight_BHST.shape
    groups = value_BGTV.shape[1]
    grouped = weight_BHST.reshape(batch, groups, heads // groups, queries, tokens)
    mixed = torch.einsum("bgpst,bgtv->bgpsv", grouped, value_BGTV.to(weight_BHST.dtype))
    return mixed.reshape(batch, heads, queries, value_BGTV.shape[3])
