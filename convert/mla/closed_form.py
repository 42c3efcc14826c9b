"""The closed form of one layer: from its moments to `AttentionMaps`.

Legend as in `attention`; N here counts components, K = G D.
"""

import torch
from torch import Tensor

from reattend.convert.mla.attention import AttentionMaps
from reattend.convert.mla.lowrank import LowRank, joint_low_rank, output_metric
from reattend.convert.mla.rotation import Components, key_rows, query_rows
from reattend.convert.mla.statistics import TokenMoments


def position_free_form(components: Components, kept_P: Tensor, num_heads: int) -> Tensor:
    """Return (H, D, K): q_h . (form[h] k) is the unrotated score of all components but the kept ones."""
    rest = torch.ones(len(components.energy_N), dtype=torch.bool)
    rest[kept_P] = False
    rest_N = rest.nonzero()[:, 0]
    query_HRD = query_rows(components, rest_N, num_heads)
    return torch.einsum("hrd,rk->hdk", query_HRD, key_rows(components, rest_N).flatten(1))


def convert_layer(
    moments: TokenMoments, query_HDD: Tensor, output_EHD: Tensor, components: Components, kept_P: Tensor,
    low_rank: tuple[int, bool, float | None] = (0, True, 1.0),
) -> AttentionMaps:  # fmt: skip
    """Keep RoPE on `kept_P` and truncate the rest. `low_rank` is (rank, centred, value_weight)."""
    heads, kv = len(query_HDD), components.key_NGF.shape[1]
    free_HDK = position_free_form(components, kept_P, heads)
    metric = output_metric(free_HDK, query_HDD, output_EHD, kv)
    rank, centred, value_weight = low_rank
    latent = joint_low_rank(moments, metric, rank, centred=centred, value_weight=value_weight)
    return assemble(components, kept_P, free_HDK, latent, centred)


def assemble(
    components: Components, kept_P: Tensor, free_HDK: Tensor, latent: LowRank, centred: bool
) -> AttentionMaps:
    """Put the rotary rows and the latent's maps together."""
    heads, head_dim, width = free_HDK.shape
    kv = width // head_dim
    group_H = torch.arange(heads) // (heads // kv)
    value_GDL = latent.up_ZL[width:].view(kv, head_dim, -1)
    shift_GD = latent.shift_Z[width:].view(kv, head_dim)
    return AttentionMaps(
        key_rows(components, kept_P), query_rows(components, kept_P, heads),
        latent.down_LZ[:, :width].reshape(-1, kv, head_dim),
        latent.down_LZ[:, width:].reshape(-1, kv, head_dim),
        free_HDK @ latent.up_ZL[:width], value_GDL[group_H], shift_GD[group_H] if centred else None,
        components.frequency_N[kept_P],
    )  # fmt: skip
