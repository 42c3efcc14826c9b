"""Sizes of a source's attention, its rotary embedding, and what the native format needs to hold it.

Legend as in `attention`: E hidden, H query heads, G KV heads, D head dim, R rotary numbers, L latent.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from reattend.convert.mla.attention import LatentAttention
from reattend.convert.mla.queries import QueryLatent
from reattend.convert.mla.rope import Rotary, read_rotary
from reattend.errors import Refusal
from reattend.families.source import Source


@dataclass(frozen=True)
class Geometry:
    """Sizes and frequencies of every layer's attention; `windows` is what each layer sees (empty: all see all)."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary: Rotary
    theta: float
    max_positions: int
    query_bias: bool
    norm_eps: float = 1e-6
    windows: tuple[int | None, ...] = ()

    def window(self, layer: int) -> int | None:
        """The tokens that a token of a layer sees, itself among them; None: all before it."""
        return self.windows[layer] if self.windows else None

    @property
    def scale(self) -> float:
        """The softmax scale, without the rotary factor."""
        return 1 / math.sqrt(self.head_dim)


def read_geometry(source: Source) -> Geometry:
    """Return the geometry of a Llama-like source. Raises `Refusal` for a rope that no fixed list expresses."""
    parameters = rope_parameters(source.config)
    max_positions = int(source.get("max_position_embeddings") or 2048)
    try:
        rotary = read_rotary(parameters, source.head_dim, max_positions)
    except (ValueError, KeyError, TypeError) as error:
        raise Refusal(f"config.json: rope_parameters: {error}") from error
    return Geometry(
        source.size("hidden"),
        int(source.get("heads")),
        source.num_kv_heads,
        source.head_dim,
        rotary,
        float(parameters["rope_theta"]),
        max_positions,
        attention_name(source, 0, "q_proj.bias") in source.tensors,
        float(source.get("rms_norm_eps") or 1e-6),
    )


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config's rope parameters, from the key of transformers 5 or from the two older ones."""
    theta = config.get("rope_theta") or 10000.0  # the default of every Llama-like class
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return {"rope_type": "default", "rope_theta": theta, **found}


def attention_name(source: Source, layer: int, name: str) -> str:
    """Return the full name of a tensor of a layer's attention, such as `q_proj.weight`."""
    return f"{source.layer_prefix(layer)}self_attn.{name}"


def query_latent(geometry: Geometry, query_rank: int | None) -> QueryLatent | None:
    """Return what query latents hold, if there are any: for a low rank, or for biases, which have no other place."""
    if query_rank is None and not geometry.query_bias:
        return None
    return QueryLatent(query_rank or geometry.hidden, geometry.query_bias)


def native_specs(
    geometry: Geometry, rope_dim: int, latent_rank: int, *, biased: bool, queries: QueryLatent | None
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a native layer's `self_attn` by short names."""
    hidden, heads, head_dim = geometry.hidden, geometry.heads, geometry.head_dim
    query = heads * (head_dim + rope_dim)
    shapes: dict[str, tuple[int, ...]] = {
        "kv_a_proj_with_mqa.weight": (latent_rank + rope_dim, hidden),
        "kv_a_layernorm.weight": (latent_rank,),
        "kv_b_proj.weight": (heads * 2 * head_dim, latent_rank),
        "o_proj.weight": (hidden, heads * head_dim),
    }
    if biased:
        shapes |= {"kv_a_proj_with_mqa.bias": (latent_rank + rope_dim,), "o_proj.bias": (hidden,)}
    if queries is None:
        return shapes | {"q_proj.weight": (query, hidden)}
    shapes |= {"q_a_proj.bias": (queries.width,)} if biased else {}
    return shapes | {
        "q_a_proj.weight": (queries.width, hidden),
        "q_a_layernorm.weight": (queries.width,),
        "q_b_proj.weight": (query, queries.width),
    }


def empty_layer(geometry: Geometry, rope_dim: int, latent_rank: int) -> LatentAttention:
    """Return a converted layer without numbers or biases, for its sizes."""
    heads, head_dim, hidden = geometry.heads, geometry.head_dim, geometry.hidden
    sizes = (
        (heads, head_dim + rope_dim, hidden), (latent_rank + rope_dim, hidden),
        (heads, head_dim, latent_rank), (heads, head_dim, latent_rank), (hidden, heads, head_dim),
    )  # fmt: skip
    query, down, key, value, output = (torch.empty(size, device="meta") for size in sizes)
    return LatentAttention(query, down, key, value, output, geometry.rotary, geometry.scale)
