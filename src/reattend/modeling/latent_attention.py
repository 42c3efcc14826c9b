"""MLA as it is meant to run: decode in the latent space, prefill expanded; stock `DeepseekV3` and portable models.

They cache the latent and expand all of it to keys and values of every head at each step. Here the up-projections are
applied to the new token's queries and output instead (DeepSeek-V2, arXiv 2405.04434, 2.1.2).

Legend: B batch, S new tokens, T all tokens, H heads, N position-free, R rotary and V value numbers, L latent rank.
"""

import logging
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RMSNorm,
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_interleave,
)

from reattend.kernels.mla_decode import mla_decode
from reattend.modeling.attention_backend import EXACT, INT8, SIMULATED, seen_by
from reattend.modeling.int8 import Int8Linear
from reattend.modeling.latent_cache import latent_layer, rows_held
from reattend.modeling.portable.latent_reattend import ReattendLatentAttention

_LOG = logging.getLogger(__name__)
_IMPLEMENTATIONS = ("sdpa", EXACT, INT8, SIMULATED)


class _Absorbing:
    """What MLA layers, stock or portable, have in common in the absorbed form: attributes are named alike."""

    config: Any
    kv_b_proj: Any
    training: bool
    num_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    v_head_dim: int
    scaling: float

    def _absorbs(self, x: Tensor, held: int, mask: Tensor | None) -> bool:
        """Whether tokens `x` (B, S, E) after `held` others can run absorbed, and are cheaper so."""
        if self.training or self.config._attn_implementation not in _IMPLEMENTATIONS or not _is_plain(self.kv_b_proj):
            return False
        if torch.is_autocast_enabled(x.device.type):  # queries and rows may differ in dtype
            return False
        if mask is None and x.shape[1] > 1:  # causal by a flag, and as many keys as queries
            return False
        if mask is not None and (mask.dim() != 4 or mask.shape[1] != 1):  # not one mask for all heads
            return False
        return self._is_cheaper(x.shape[1], held + x.shape[1])

    def _is_cheaper(self, queries: int, tokens: int) -> bool:
        """Whether absorbing takes fewer multiplications than expanding every token.

        Both forms are linear in S and T: taking one query into the latent space and back costs as much as
        expanding one token, and a latent score and sum cost 2L - N - V more than expanded ones.
        """
        rank, expanded = int(self.kv_lora_rank), int(self.qk_nope_head_dim + self.v_head_dim)
        once = rank * expanded
        return queries * (once + tokens * (2 * rank - expanded)) < tokens * once

    def _absorbed(
        self, free: Tensor, query_rope: Tensor, latent: Tensor, rope: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Return what the heads found (B, S, H, V)."""
        key_HNL, value_HVL = self._up(free.dtype)
        batch, heads, new, nope = free.shape
        # One product per head for the whole batch, so that the weight is not repeated along it.
        query_latent = torch.bmm(free.transpose(0, 1).reshape(heads, -1, nope), key_HNL)
        query_latent = query_latent.view(heads, batch, new, -1).transpose(0, 1)
        seen = seen_by(mask, latent, new)
        mixed = mla_decode(query_latent, query_rope, latent[:, 0], rope[:, 0], scale=self.scaling, mask=seen)
        out = torch.bmm(mixed.transpose(0, 1).reshape(heads, batch * new, -1), value_HVL.transpose(1, 2))
        return out.view(heads, batch, new, -1).permute(1, 2, 0, 3)

    def _up(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the up-projections (H, N, L) and (H, V, L): views; int8 codes are dequantised anew."""
        weight: Tensor = self.kv_b_proj.weight.to(dtype).view(self.num_heads, -1, self.kv_lora_rank)
        return weight[:, : self.qk_nope_head_dim], weight[:, self.qk_nope_head_dim :]


class LatentAttention(_Absorbing, DeepseekV3Attention):  # type: ignore[misc]
    """Stock attention with the same parameters, absorbed where that is cheaper.

    It runs as stock does while training, under autocast, without a cache, with a cache that is no plain growing
    one, with an attention implementation that is neither sdpa nor ours, and where an adapter or a hook sits on
    `kv_b_proj`.
    """

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Tensor | None,
        cache: Cache | None = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Return the output (B, S, E), and the attention weights where stock gives them."""
        layer = latent_layer(cache, self.layer_idx)
        if layer is None or not self._absorbs(hidden_states, layer.get_seq_length(), attention_mask):
            # stock's signature is written through a decorator that mypy can't see through
            stock: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states, position_embeddings, attention_mask, cache=cache, **kwargs
            )
            return stock
        free, query_rope, latent, rope = self._project(hidden_states, position_embeddings)
        latent, rope = cache.update(latent, rope, self.layer_idx)  # type: ignore[union-attr]
        found_BSHV = self._absorbed(free, query_rope, latent, rope, attention_mask)
        return self.o_proj(found_BSHV.flatten(2)), None

    def _project(
        self, x: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return queries (B, H, S, N), (B, H, S, R) and rows (B, 1, S, L), (B, 1, S, R), as stock makes them."""
        batch, new = x.shape[:2]
        query = self.q_proj(x) if self.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        query = query.view(batch, new, -1, self.qk_head_dim).transpose(1, 2)
        free, query_rope = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], -1)
        latent, rope = self.kv_a_proj_with_mqa(x).split([self.kv_lora_rank, self.qk_rope_head_dim], -1)
        rotate = apply_rotary_pos_emb_interleave if self.config.rope_interleave else apply_rotary_pos_emb
        query_rope, rope = rotate(query_rope, rope.unsqueeze(1), *position_embeddings)
        return free, query_rope, self.kv_a_layernorm(latent).unsqueeze(1), rope


class PortableLatentAttention(_Absorbing, ReattendLatentAttention):  # type: ignore[misc]
    """The portable model's attention with the same parameters, absorbed where stock's is, and where windows slide.

    Clipped softmax is not computed on latents: with it layers run expanded.
    """

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Tensor | None = None,
        cache: Cache | None = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Return the output (B, S, E), and the attention weights where the expanded form gives them."""
        held = rows_held(cache, self.layer_idx)
        if held is None or self.gamma is not None or not self._absorbs(hidden_states, held, attention_mask):
            expanded: tuple[Tensor, Tensor | None] = super().forward(  # type: ignore[no-untyped-call]
                hidden_states, position_embeddings, attention_mask, cache=cache, **kwargs
            )
            return expanded
        free, query_rope = self.queries(hidden_states, position_embeddings)  # type: ignore[no-untyped-call]
        latent, rope = self.rows(hidden_states, position_embeddings)
        latent, rope = cache.update(latent, rope, self.layer_idx, kwargs=kwargs)  # type: ignore[union-attr]
        found_BSHV = self._absorbed(free, query_rope, latent, rope, attention_mask)
        return self.output(hidden_states, found_BSHV), None  # type: ignore[no-untyped-call]

    def rows(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the rows to be cached, latents rounded as the int8 product behind them rounds its input."""
        latent, rope = super().rows(hidden_states, position_embeddings)  # type: ignore[no-untyped-call]
        reader = self.kv_b_proj
        rounds = isinstance(reader, Int8Linear) and reader.activations == "int8"
        return (reader.rounded(latent) if rounds else latent), rope


class RoundedNorm(DeepseekV3RMSNorm):  # type: ignore[misc]
    """A latent norm whose output is rounded as the int8 product behind it rounds its input.

    Rounding twice is rounding once, so the expanded form does not change, and the absorbed form reads the same
    rows from the cache.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise and round (B, S, L)."""
        (reader,) = self.reader
        rounded: Tensor = reader.rounded(super().forward(hidden_states))
        return rounded


def run_absorbed(model: nn.Module) -> int:
    """Let a model's MLA layers, stock or portable, run absorbed, in place; return how many.

    Only classes change: parameters, their names, hooks and what `save_pretrained` writes stay. Of stock's none where
    this transformers caches expanded keys.
    """
    portable = [module for module in model.modules() if type(module) is ReattendLatentAttention]
    for own in portable:
        own.__class__ = PortableLatentAttention
    return len(portable) + _run_stock_absorbed(model)


def _run_stock_absorbed(model: nn.Module) -> int:
    layers = [module for module in model.modules() if type(module) is DeepseekV3Attention]
    if not layers:
        return 0
    if not hasattr(DeepseekV3Attention, "expand_kv"):
        _LOG.warning("transformers %s caches expanded keys: MLA runs as stock does", transformers.__version__)
        return 0
    for layer in layers:
        layer.__class__ = LatentAttention
        reader = layer.kv_b_proj
        if isinstance(reader, Int8Linear) and reader.activations == "int8":
            norm = layer.kv_a_layernorm
            norm.__class__ = RoundedNorm
            norm.__dict__["reader"] = (reader,)  # in a tuple: no submodule, so nothing is stored twice
    return len(layers)


def _is_plain(linear: nn.Module) -> bool:
    """Whether a layer is its weight and nothing else."""
    return type(linear) in (nn.Linear, Int8Linear) and not (linear._forward_hooks or linear._forward_pre_hooks)
