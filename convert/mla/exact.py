"""Conversions that change nothing: GQA as MLA with the same cache, and RoPE pairs rotated across KV heads.

The first is TransMLA's opening claim (arXiv 2502.07864, section 3), for RoPE inside the cache: every KV
head's keys become rotary rows, a query reads only its own group's, and the latent holds the values.

Legend as in `attention`; F = D / 2, component c of frequency f is pair f G + c.
"""

import torch
from torch import Tensor

from reattend.convert.mla.attention import AttentionMaps
from reattend.convert.mla.rotation import Components, key_rows, query_rows


def same_cache(num_heads: int, num_kv_heads: int, head_dim: int) -> AttentionMaps:
    """Return the maps of the exact limit with R = L = G D: the cache holds k and v themselves."""
    heads, kv, width = num_heads, num_kv_heads, num_kv_heads * head_dim
    eye = torch.eye(width, dtype=torch.float64).view(width, kv, head_dim)
    order_R = _interleaved(kv, head_dim)
    rope_key_RGD = eye[order_R]
    group_H = torch.arange(heads) // (heads // kv)
    rope_query_HRD = rope_key_RGD[:, group_H].transpose(0, 1)
    value_HDL = eye.permute(1, 2, 0)[group_H]
    pair_P = torch.arange(head_dim // 2).repeat(kv)
    zeros = torch.zeros
    return AttentionMaps(
        rope_key_RGD, rope_query_HRD, zeros(width, kv, head_dim, dtype=torch.float64), eye,
        zeros(heads, head_dim, width, dtype=torch.float64), value_HDL, None, pair_P,
    )  # fmt: skip


def _interleaved(num_kv_heads: int, head_dim: int) -> Tensor:
    """Return source indices (G D,) that put each head's rotate-half pairs side by side."""
    half = head_dim // 2
    pairs = torch.stack([torch.arange(half), torch.arange(half) + half], 1).flatten()
    return (torch.arange(num_kv_heads)[:, None] * head_dim + pairs).flatten()


def rotated_cache(components: Components, num_heads: int) -> AttentionMaps:
    """Return the maps that keep RoPE on every component: exact for any invertible rotation per frequency."""
    every = torch.arange(len(components.energy_N))
    kv, half = components.key_NGF.shape[1:]
    plain = same_cache(num_heads, kv, 2 * half)
    return AttentionMaps(
        key_rows(components, every), query_rows(components, every, num_heads), plain.down_key_LGD,
        plain.down_value_LGD, plain.key_HDL, plain.value_HDL, None, components.frequency_N,
    )  # fmt: skip
