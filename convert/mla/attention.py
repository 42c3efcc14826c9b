"""One layer's attention before and after conversion, as plain tensors with a function that runs it.

`AttentionMaps` is the conversion itself: linear maps on pre-RoPE queries, keys and values (after biases and
q/k norms, where a family has them). `compose` multiplies them into the projections of a layer without q/k
norms; a layer with them keeps its projections and applies the maps to what its norms put out.

Legend: B batch, T tokens, E hidden, H query heads, G KV heads, D source head dim, N position-free numbers per
query head, R rotary numbers (interleaved pairs, P = R / 2), Q = N + R, L latent, C = L + R, V value numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from reattend.convert.mla.causal import causal_attention
from reattend.convert.mla.rope import Rotary, angles, rotate_halves, rotate_pairs


@dataclass(frozen=True)
class SourceAttention:
    """A GQA layer: projections with biases, q/k norms, frequencies, softmax scale (without the rotary factor).

    A token sees itself and the `window` - 1 tokens before it (None: all).
    """

    q_HDE: Tensor
    k_GDE: Tensor
    v_GDE: Tensor
    o_EHD: Tensor
    rotary: Rotary
    scale: float
    q_bias_HD: Tensor | None = None
    k_bias_GD: Tensor | None = None
    v_bias_GD: Tensor | None = None
    o_bias_E: Tensor | None = None
    q_norm_D: Tensor | None = None
    k_norm_D: Tensor | None = None
    norm_eps: float = 1e-6
    window: int | None = None

    def to(self, dtype: torch.dtype) -> "SourceAttention":
        """Return the same layer with its tensors in `dtype`; frequencies keep theirs."""
        return _cast(self, dtype)

    def project(self, x_BTE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return pre-RoPE q (B, T, H, D), k and v (B, T, G, D), q and k normalised where the layer does so."""
        q, k, v = (
            torch.einsum("bte,hde->bthd", x_BTE, weight) if bias is None
            else torch.einsum("bte,hde->bthd", x_BTE, weight) + bias
            for weight, bias in (
                (self.q_HDE, self.q_bias_HD), (self.k_GDE, self.k_bias_GD), (self.v_GDE, self.v_bias_GD)
            )
        )  # fmt: skip
        return self._normed(q, self.q_norm_D), self._normed(k, self.k_norm_D), v

    def _normed(self, x: Tensor, weight_D: Tensor | None) -> Tensor:
        if weight_D is None:
            return x
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.norm_eps) * weight_D

    def attend(self, x_BTE: Tensor) -> Tensor:
        """Return the causal attention output (B, T, E) for positions from 0."""
        q, k, v = (y.transpose(1, 2) for y in self.project(x_BTE))
        tokens = x_BTE.shape[1]
        angle_TF = angles(self.rotary.at_length(tokens), torch.arange(tokens))
        groups = q.shape[1] // k.shape[1]
        k, v = (y.repeat_interleave(groups, 1) for y in (rotate_halves(k, angle_TF), v))
        scale = self.scale * self.rotary.factor**2
        mixed_BHTD = causal_attention(rotate_halves(q, angle_TF), k, v, scale, self.window)
        return _output(mixed_BHTD, self.o_EHD, self.o_bias_E)


def read_source(tensors: Mapping[str, Tensor], head_dim: int, rotary: Rotary, scale: float) -> SourceAttention:
    """View the tensors of a `self_attn` (`q_proj.weight` ..) head by head; biases and norms where they exist."""
    q, k, v = (_by_head(tensors[f"{n}_proj.weight"], head_dim) for n in "qkv")
    biases = [tensors.get(f"{n}_proj.bias") for n in "qkv"]
    q_bias, k_bias, v_bias = (None if b is None else b.view(-1, head_dim) for b in biases)
    o_EHD = tensors["o_proj.weight"].view(len(tensors["o_proj.weight"]), -1, head_dim)
    return SourceAttention(
        q, k, v, o_EHD, rotary, scale, q_bias, k_bias, v_bias, tensors.get("o_proj.bias"),
        tensors.get("q_norm.weight"), tensors.get("k_norm.weight"),
    )  # fmt: skip


def _by_head(weight_OE: Tensor, head_dim: int) -> Tensor:
    return weight_OE.view(-1, head_dim, weight_OE.shape[1])


@dataclass(frozen=True)
class AttentionMaps:
    """Linear maps from a source layer's q, k, v to MLA's; fp64.

    Position-free score of head h: q_h . (key_HDL c); its value: value_HDL c + value_bias_HD; with
    c = down_key_LGD k + down_value_LGD v. Rotary rows: rope_key_RGD k and rope_query_HRD q_h, at
    `pair_P`, indices into the source's frequency list.
    """

    rope_key_RGD: Tensor
    rope_query_HRD: Tensor
    down_key_LGD: Tensor
    down_value_LGD: Tensor
    key_HDL: Tensor
    value_HDL: Tensor
    value_bias_HD: Tensor | None
    pair_P: Tensor


@dataclass(frozen=True)
class LatentAttention:
    """A converted layer. `scale` is the whole factor on query . key; the rotary factor is 1 here.

    Queries are [position-free; rotary] per head, `down_CE` gives [latent; rotary] rows. With q/k norms `inputs`
    is the layer that was: `query_HQE` then maps each head's normed query (E = D), and `down_CE` the normed keys and
    the values of all heads (E = 2 G D).
    """

    query_HQE: Tensor
    down_CE: Tensor
    key_HNL: Tensor
    value_HVL: Tensor
    output_EHV: Tensor
    rotary: Rotary
    scale: float
    query_bias_HQ: Tensor | None = None
    down_bias_C: Tensor | None = None
    output_bias_E: Tensor | None = None
    window: int | None = None
    inputs: SourceAttention | None = None

    @property
    def latent_rank(self) -> int:
        """Latent numbers per token in the cache."""
        return self.key_HNL.shape[-1]

    @property
    def rope_dim(self) -> int:
        """Rotary numbers per token in the cache."""
        return self.down_CE.shape[0] - self.latent_rank

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are present, by field name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self, dtype: torch.dtype) -> "LatentAttention":
        """Return the same layer with its tensors in `dtype`; frequencies keep theirs."""
        inputs = None if self.inputs is None else self.inputs.to(dtype)
        return replace(_cast(self, dtype), inputs=inputs)

    def attend(self, x_BTE: Tensor) -> Tensor:
        """Return the causal attention output (B, T, E) for positions from 0."""
        return _output(self.mix(x_BTE), self.output_EHV, self.output_bias_E)

    def mix(self, x_BTE: Tensor) -> Tensor:
        """Return the mixed values that the output projection reads (B, H, T, V), keys and values expanded."""
        tokens, rank = x_BTE.shape[1], self.latent_rank
        q, down = self._project(x_BTE)
        angle_TP = angles(self.rotary.at_length(tokens), torch.arange(tokens))
        free = self.key_HNL.shape[1]
        q = torch.cat([q[..., :free], rotate_pairs(q[..., free:], angle_TP)], -1)
        latent_BTL, rope_BTR = down[..., :rank], rotate_pairs(down[..., rank:], angle_TP)
        k_free = torch.einsum("btl,hnl->bhtn", latent_BTL, self.key_HNL)
        k = torch.cat([k_free, rope_BTR[:, None].expand(-1, len(self.key_HNL), -1, -1)], -1)
        v = torch.einsum("btl,hvl->bhtv", latent_BTL, self.value_HVL)
        return causal_attention(q, k, v, self.scale, self.window)

    def _project(self, x_BTE: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries (B, H, T, Q) and rows (B, T, C), neither rotated."""
        if self.inputs is None:
            q = torch.einsum("bte,hqe->bhtq", x_BTE, self.query_HQE)
            read = x_BTE
        else:
            query, key, value = self.inputs.project(x_BTE)
            q = torch.einsum("bthd,hqd->bhtq", query, self.query_HQE)
            read = torch.cat([key.flatten(2), value.flatten(2)], -1)
        q = q if self.query_bias_HQ is None else q + self.query_bias_HQ[:, None]
        down = read @ self.down_CE.T
        return q, down if self.down_bias_C is None else down + self.down_bias_C


_Layer = TypeVar("_Layer", SourceAttention, LatentAttention)


def _cast(layer: _Layer, dtype: torch.dtype) -> _Layer:
    changed: dict[str, Any] = {n: value.to(dtype) for n, value in vars(layer).items() if isinstance(value, Tensor)}
    return replace(layer, **changed)


def _output(mixed_BHTV: Tensor, output_EHV: Tensor, bias_E: Tensor | None) -> Tensor:
    out = torch.einsum("bhtv,ehv->bte", mixed_BHTV, output_EHV)
    return out if bias_E is None else out + bias_E


def compose(source: SourceAttention, maps: AttentionMaps) -> LatentAttention:
    """Multiply `maps` into the projections of `source`, in fp64. Exact: no approximation is made here.

    With q/k norms the maps stay beside the projections.
    """
    if source.q_norm_D is not None:
        return _beside(source, maps)
    heads = len(source.q_HDE)
    weights = _composed(maps, *(w.double() for w in (source.q_HDE, source.k_GDE, source.v_GDE)))
    biases = _composed(maps, *(_bias(w, b) for w, b in (
        (source.q_HDE, source.q_bias_HD), (source.k_GDE, source.k_bias_GD), (source.v_GDE, source.v_bias_GD)
    )))  # fmt: skip
    has_kv_bias = source.k_bias_GD is not None or source.v_bias_GD is not None
    o_EHD = source.o_EHD.double()
    return LatentAttention(
        weights[0], weights[1], maps.key_HDL, maps.value_HDL.expand(heads, -1, -1), o_EHD,
        source.rotary.pick(maps.pair_P), source.scale * source.rotary.factor**2,
        biases[0][..., 0] if source.q_bias_HD is not None else None,
        biases[1][..., 0] if has_kv_bias else None,
        _output_bias(o_EHD, maps.value_bias_HD, source.o_bias_E), source.window,
    )  # fmt: skip


def _beside(source: SourceAttention, maps: AttentionMaps) -> LatentAttention:
    heads, head_dim = source.q_HDE.shape[:2]
    query_HQD = torch.cat([torch.eye(head_dim, dtype=torch.float64).expand(heads, -1, -1), maps.rope_query_HRD], 1)
    latent = torch.cat([maps.down_key_LGD.flatten(1), maps.down_value_LGD.flatten(1)], 1)
    rope = maps.rope_key_RGD.flatten(1)
    o_EHD = source.o_EHD.double()
    return LatentAttention(
        query_HQD, torch.cat([latent, torch.cat([rope, torch.zeros_like(rope)], 1)]),
        maps.key_HDL, maps.value_HDL.expand(heads, -1, -1), o_EHD,
        source.rotary.pick(maps.pair_P), source.scale * source.rotary.factor**2,
        output_bias_E=_output_bias(o_EHD, maps.value_bias_HD, source.o_bias_E),
        window=source.window, inputs=source.to(torch.float64),
    )  # fmt: skip


def _bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    zero = torch.zeros(*weight.shape[:2], 1, dtype=torch.float64)
    return zero if bias is None else bias.double()[..., None]


def _composed(maps: AttentionMaps, q_HDE: Tensor, k_GDE: Tensor, v_GDE: Tensor) -> tuple[Tensor, Tensor]:
    query_HQE = torch.cat([q_HDE, torch.einsum("hrd,hde->hre", maps.rope_query_HRD, q_HDE)], 1)
    latent = torch.einsum("lgd,gde->le", maps.down_key_LGD, k_GDE)
    latent = latent + torch.einsum("lgd,gde->le", maps.down_value_LGD, v_GDE)
    return query_HQE, torch.cat([latent, torch.einsum("rgd,gde->re", maps.rope_key_RGD, k_GDE)])


def _output_bias(o_EHD: Tensor, value_bias_HD: Tensor | None, bias_E: Tensor | None) -> Tensor | None:
    bias = None if bias_E is None else bias_E.double()
    if value_bias_HD is None:
        return bias
    # Softmax weights sum to 1, so a constant added to every value passes through attention unchanged.
    moved = torch.einsum("ehd,hd->e", o_EHD, value_bias_HD)
    return moved if bias is None else bias + moved
