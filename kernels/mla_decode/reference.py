"""The specification of absorbed MLA decode in plain torch and fp64; every route is tested on it.

DeepSeek-V2 (arXiv 2405.04434), section 2.1: one latent row per token is key and value of all heads, because the
up-projections are applied to queries and outputs instead.
Legend: B batch, H heads, S queries, T cached tokens, L latent rank, R rotary numbers.
"""

import torch
from torch import Tensor


def mla_decode(
    query_latent_BHSL: Tensor, query_rope_BHSR: Tensor, latent_BTL: Tensor, rope_BTR: Tensor, *,
    scale: float, mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return softmax(scale (q_latent latent^T + q_rope rope^T) + mask) latent (B, H, S, L) in the queries' dtype."""
    query = torch.cat([query_latent_BHSL, query_rope_BHSR], -1).double()
    key = torch.cat([latent_BTL, rope_BTR], -1).double()
    score_BHST = torch.einsum("bhsc,btc->bhst", query, key) * scale
    if mask is not None:
        score_BHST = score_BHST + additive(mask, score_BHST.dtype)
    mixed = torch.einsum("bhst,btl->bhsl", score_BHST.softmax(-1), latent_BTL.double())
    return mixed.to(query_latent_BHSL.dtype)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask as numbers to add: finite, so that a query that sees nothing gives a mean and no NaN."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(torch.float32).min / 2)
