"""The closed form of one layer: from its moments to `AttentionMaps`.

Legend as in `attention`; N here counts components, S those that keep RoPE, K = G D.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reattend.convert.mla.attention import AttentionMaps
from reattend.convert.mla.lowrank import LowRank, joint_low_rank, output_metric
from reattend.convert.mla.rotation import Components, key_rows, query_rows
from reattend.convert.mla.selection import RopePart
from reattend.convert.mla.statistics import LayerMoments


@dataclass(frozen=True)
class Choice:
    """What is chosen per layer by the measured error of its output.

    `attended_share`: weight of the attention-weighted moments against the plain ones. `value_weight`: trace of
    values over trace of keys. `phase_share`: how far a dropped rotation is replaced by its mean over the
    attention's distances, against by 1 (content makes attention nearer than its mean distance).
    """

    attended_share: float = 0.5
    value_weight: float = 0.5
    phase_share: float = 0.3


_GRID: tuple[tuple[str, tuple[float, ...]], ...] = (
    ("phase_share", (0.15, 0.6, 1.0)),
    ("value_weight", (0.2, 1.0)),
    ("attended_share", (0.8,)),
)


def best_choice(error: Callable[[Choice], float]) -> tuple[Choice, float]:
    """Search the grid one key after the other; `error` measures a choice on the selection text."""
    best = Choice()
    lowest = error(best)
    for key, values in _GRID:
        start = best
        for value in values:
            tried = replace(start, **{key: value})
            measured = error(tried)
            if measured < lowest:
                best, lowest = tried, measured
    return best, lowest


def position_free_form(rope: RopePart, num_heads: int, phase_share: float) -> Tensor:
    """Return (H, D, K): q_h . (form[h] k) is the score of the components that lose RoPE.

    Their rotation exp(i w (u - t)) is replaced by a constant between 1 and its mean.
    """
    parts = rope.components
    rest = torch.ones(len(parts.energy_N), dtype=torch.bool)
    rest[rope.kept_S] = False
    rest_N = rest.nonzero()[:, 0]
    constant_N = torch.lerp(torch.ones_like(rope.phase_F), rope.phase_F.conj(), phase_share)[parts.frequency_N]
    turned = Components(parts.key_NGF * constant_N[:, None, None], parts.query_NGF, parts.energy_N, parts.frequency_N)
    query_HRD = query_rows(parts, rest_N, num_heads)
    return torch.einsum("hrd,rk->hdk", query_HRD, key_rows(turned, rest_N).flatten(1))


def convert_layer(
    moments: LayerMoments, output_EHD: Tensor, rope: RopePart, rank: int, choice: Choice, *, centred: bool = True
) -> AttentionMaps:
    """Keep RoPE on `rope.kept_S` and truncate the rest to `rank`.

    `centred` moves the values' mean into a bias, which the target must be able to hold.
    """
    heads = len(moments.query_HDD)
    free_HDK = position_free_form(rope, heads, choice.phase_share)
    metric = output_metric(free_HDK, moments.query_HDD, output_EHD, rope.components.key_NGF.shape[1])
    tokens = moments.plain.mix(moments.attended, choice.attended_share)
    latent = joint_low_rank(tokens, metric, rank, centred=centred, value_weight=choice.value_weight)
    return assemble(rope, free_HDK, latent, centred)


def assemble(rope: RopePart, free_HDK: Tensor, latent: LowRank, centred: bool) -> AttentionMaps:
    """Put the rotary rows and the latent's maps together."""
    heads, head_dim, width = free_HDK.shape
    kv = width // head_dim
    group_H = torch.arange(heads) // (heads // kv)
    value_GDL = latent.up_ZL[width:].view(kv, head_dim, -1)
    shift_GD = latent.shift_Z[width:].view(kv, head_dim)
    return AttentionMaps(
        key_rows(rope.components, rope.kept_S),
        query_rows(rope.components, rope.kept_S, heads),
        latent.down_LZ[:, :width].reshape(-1, kv, head_dim),
        latent.down_LZ[:, width:].reshape(-1, kv, head_dim),
        free_HDK @ latent.up_ZL[:width],
        value_GDL[group_H],
        shift_GD[group_H] if centred else None,
        rope.pair_S,
    )
