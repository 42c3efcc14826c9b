"""A converted layer as the tensors of the portable model's latent attention, and the config that says so.

With q/k norms the source's projections and norms stay as they are, and the maps stand behind them.

Legend as in `attention`; Y layers, S = R / 2 pairs.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from reattend.convert.mla.attention import LatentAttention
from reattend.convert.mla.geometry import Geometry, read_geometry
from reattend.convert.portable.form import portable_config
from reattend.families.attention_kinds import KEY
from reattend.families.source import Source


def portable_geometry(source: Source) -> Geometry:
    """Return the geometry of a source with what each layer sees. Raises `Refusal` as `check_portable` does."""
    config = portable_config(source, {})
    windows = [config["sliding_window"] if kind == "sliding_attention" else None for kind in config["layer_types"]]
    return replace(read_geometry(source), windows=tuple(windows))


def portable_specs(source: Source, geometry: Geometry, rope_dim: int, rank: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a converted layer's `self_attn` by short names; with q/k norms, of what is not kept."""
    hidden, heads, head_dim = geometry.hidden, geometry.heads, geometry.head_dim
    normed = "qk_norm" in source.family.features
    read = 2 * geometry.kv_heads * head_dim if normed else hidden
    shapes: dict[str, tuple[int, ...]] = {
        "kv_a_proj_with_mqa.weight": (rank + rope_dim, read),
        "kv_b_proj.weight": (heads * 2 * head_dim, rank),
        "o_proj.weight": (hidden, heads * head_dim),
        "o_proj.bias": (hidden,),
    }
    if normed:
        return shapes | {"q_rope": (heads, rope_dim, head_dim)}
    shapes["q_proj.weight"] = (heads * (head_dim + rope_dim), hidden)
    if geometry.query_bias:
        shapes |= {"q_proj.bias": shapes["q_proj.weight"][:1], "kv_a_proj_with_mqa.bias": (rank + rope_dim,)}
    return shapes


def portable_layer(attention: LatentAttention, head_dim: int, *, biased: bool) -> dict[str, Tensor]:
    """Return the tensors of `portable_specs`, fp64. A layer without a bias gets zeros where the model has them.

    The portable model scales scores by D^-1/2 and turns with the source's own cosines, whose factor reaches the
    rotary part only: the position-free part gets it here, on the keys.
    """
    free, rank = attention.key_HNL.shape[1], attention.latent_rank
    query_HQE, down_CE = attention.query_HQE.double(), attention.down_CE.double()
    key_HNL = attention.key_HNL.double() * (attention.scale * math.sqrt(head_dim))
    halves_R = torch.arange(attention.rope_dim).view(-1, 2).T.flatten()
    row_C = torch.cat([torch.arange(rank), rank + halves_R])
    row_Q = torch.cat([torch.arange(free), free + halves_R])
    tensors = {
        "kv_a_proj_with_mqa.weight": down_CE[row_C],
        "o_proj.weight": attention.output_EHV.double().flatten(1),
        "o_proj.bias": _or_zeros(attention.output_bias_E, len(attention.output_EHV)),
    }
    if attention.inputs is None:
        tensors["q_proj.weight"] = query_HQE[:, row_Q].flatten(0, 1)
    else:  # a map of the query's position-free part goes to what it is multiplied by
        key_HNL = query_HQE[:, :free].transpose(1, 2) @ key_HNL
        tensors["q_rope"] = query_HQE[:, free + halves_R]
    tensors["kv_b_proj.weight"] = torch.cat([key_HNL, attention.value_HVL.double()], 1).flatten(0, 1)
    if biased and attention.inputs is None:
        query_bias_HQ = _or_zeros(attention.query_bias_HQ, query_HQE.shape[0] * query_HQE.shape[1])
        tensors["q_proj.bias"] = query_bias_HQ.view(query_HQE.shape[:2])[:, row_Q].flatten()
        tensors["kv_a_proj_with_mqa.bias"] = _or_zeros(attention.down_bias_C, len(down_CE))[row_C]
    return tensors


def _or_zeros(bias: Tensor | None, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.float64) if bias is None else bias.double()


def latent_config(source: Source, rope_dim: int, ranks: Sequence[int], pairs_YS: Tensor | None) -> dict[str, Any]:
    """Return the config of the portable form; without pairs, one with the first ones."""
    pairs = [[0] * (rope_dim // 2)] * len(ranks) if pairs_YS is None else pairs_YS.tolist()
    latent = {"rank": ranks[0] if len(set(ranks)) == 1 else list(ranks), "rope_dim": rope_dim, "pairs": pairs}
    config = portable_config(source, {"latent_attention": latent, "output_bias": True})
    return {key: value for key, value in config.items() if key != KEY}
