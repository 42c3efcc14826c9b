"""The route in plain torch: scaled_dot_product_attention where that computes the same, else the reference.

The reference runs on a few queries at a time, so that scores never take more than some memory.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from reattend.kernels.attention import reference
from reattend.kernels.attention.options import Options

_SCORES = 1 << 26  # numbers of scores at a time


def attention(
    query: Tensor, key: Tensor, value: Tensor, options: Options, *, lse: bool
) -> tuple[Tensor, Tensor | None]:
    """See `attention` and `attention_with_lse` of the package."""
    if options.is_plain and not lse:
        return _sdpa(query, key, value, options), None
    batch, heads, queries, _ = query.shape
    rows = max(1, _SCORES // max(1, batch * heads * key.shape[2]))
    if queries <= rows:
        output, sums = reference.attention(query, key, value, options)
        return output.to(query.dtype), sums
    parts = []
    for first in range(0, queries, rows):
        last = min(first + rows, queries)
        part = reference.attention(query[:, :, first:last], key, value, options.rows(first, last, key, queries))
        parts.append((part[0].to(query.dtype), part[1]))
    outputs, every = zip(*parts, strict=True)
    return torch.cat(outputs, 2), torch.cat(every, 2)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
    queries, tokens = query.shape[2], key.shape[2]
    scale, grouped = options.scale_for(query.shape[3]), bool(query.shape[1] != key.shape[1])
    whole = options.ranges is None and options.mask is None and options.window is None
    if whole and (not options.causal or queries == tokens or queries == 1):
        causal = options.causal and queries > 1
        return scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale, enable_gqa=grouped)
    seen = reference.visible(options, key, queries)
    return scaled_dot_product_attention(query, key, value, seen, scale=scale, enable_gqa=grouped)
