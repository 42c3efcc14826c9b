"""MLA decode as torch's matrix products: all heads and queries of a sequence are the rows of one.

Legend: B batch, H heads, S queries, T cached tokens, L latent rank, R rotary numbers.
"""

import torch
from torch import Tensor


def mla_decode(
    query_latent_BHSL: Tensor, query_rope_BHSR: Tensor, latent_BTL: Tensor, rope_BTR: Tensor, scale: float,
    mask: Tensor | None,
) -> Tensor:  # fmt: skip
    """See `mla_decode` of the package; scores of half types go through a softmax in fp32."""
    batch, heads, queries, rank = query_latent_BHSL.shape
    score = torch.bmm(query_latent_BHSL.reshape(batch, -1, rank), latent_BTL.transpose(1, 2))
    query_rope = query_rope_BHSR.reshape(batch, heads * queries, -1)
    score = score.baddbmm_(query_rope, rope_BTR.transpose(1, 2), beta=scale, alpha=scale)
    if mask is not None:
        _mask(score.view(batch, heads, queries, -1), mask)
    half = score.dtype in (torch.float16, torch.bfloat16)
    weight = score.softmax(-1, dtype=torch.float32 if half else None).to(score.dtype)
    return torch.bmm(weight, latent_BTL).view(batch, heads, queries, rank)


def _mask(score_BHST: Tensor, mask: Tensor) -> None:
    """Mask in place; the least number instead of -inf, so that a query that sees nothing gives no NaN."""
    if mask.dtype == torch.bool:
        score_BHST.masked_fill_(~mask, torch.finfo(score_BHST.dtype).min)
    else:
        score_BHST.add_(mask)
