"""Optional parts of attention that the portable models share. Copied into checkpoints: needs transformers only.

Each attention looks its function up, and calls it, in its own `forward`: vLLM finds attention by reading that.

Legend: B batch, S queries, T keys, H query heads, G key heads, D head dim, V value dim, E hidden size.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

GATE_KINDS = ("linear", "mlp", "all_heads_linear", "elementwise")


class AttentionGate(nn.Module):
    """Multiplies what each head found by sigma(G(x)), before the output projection; x is what attention reads.

    Kinds, by what G is (Bondarenko et al., arXiv 2306.12929, section 4.2; the last: Qiu et al., arXiv 2505.06708):

        linear            per head one linear map of the head's slice (E / H) of x
        mlp               per head E / H -> `hidden` -> ReLU -> 1 on that slice
        all_heads_linear  one linear map of x, E -> H
        elementwise       one linear map of x, E -> H V: a gate per channel
    """

    def __init__(self, kind, hidden_size, heads, value_dim, hidden=4):
        super().__init__()
        if kind not in GATE_KINDS:
            raise ValueError(f"attention_gates: kind {kind!r} is none of {', '.join(GATE_KINDS)}")
        if kind in ("linear", "mlp") and hidden_size % heads:
            raise ValueError(f"attention_gates: kind {kind!r}: {heads} heads don't divide {hidden_size}")
        self.kind, self.heads = kind, heads
        slice_ = hidden_size // heads
        if kind == "linear":
            self.weight = nn.Parameter(torch.empty(heads, slice_))
            self.bias = nn.Parameter(torch.empty(heads))
        elif kind == "mlp":
            self.in_weight = nn.Parameter(torch.empty(heads, hidden, slice_))
            self.in_bias = nn.Parameter(torch.empty(heads, hidden))
            self.weight = nn.Parameter(torch.empty(heads, hidden))
            self.bias = nn.Parameter(torch.empty(heads))
        else:
            self.proj = nn.Linear(hidden_size, heads * (value_dim if kind == "elementwise" else 1))

    def forward(self, hidden_BSE, found_BSHV):
        """Return the gated `found_BSHV`."""
        batch_shape = hidden_BSE.shape[:-1]
        if self.kind in ("linear", "mlp"):
            x = hidden_BSE.view(*batch_shape, self.heads, -1)
            if self.kind == "mlp":
                x = F.relu(torch.einsum("...he,hne->...hn", x, self.in_weight) + self.in_bias)
            logit = (x * self.weight).sum(-1, keepdim=True) + self.bias[:, None]
        else:
            # Under tensor parallelism each process holds some heads: as many as `found` has.
            logit = self.proj(hidden_BSE).view(*batch_shape, found_BSHV.shape[-2], -1)
        return found_BSHV * torch.sigmoid(logit)

    def reset(self, std):
        """Start a model without weights: gates are half open, and their maps small."""
        for name, parameter in self.named_parameters(recurse=False):
            if name in ("bias", "in_bias"):
                init.zeros_(parameter)
            else:
                init.normal_(parameter, mean=0.0, std=std)


def clipped_attention(
    module, query, key, value, mask, *, gamma, zeta=1.0, scaling=None, dropout=0.0, is_causal=None, **_
):
    """Attention with clip((zeta - gamma) softmax + gamma, 0, 1) for softmax (arXiv 2306.12929, section 4.1).

    query (B, H, S, D), key (B, G, T, D), value (B, G, T, V), gamma (H,) <= 0, zeta >= 1; `mask` as sdpa's or eager's:
    bool or additive, broadcast to (B, H, S, T), or None, which is causal from the top left for several queries of a
    causal module. Returns (B, S, H, V) and the weights (B, H, S, T).
    """
    batch, heads, queries, width = query.shape
    groups, tokens = key.shape[1:3]
    scale = 1 / math.sqrt(width) if scaling is None else scaling
    # Scaled first, as sdpa does it: in fp16 what is not scaled may overflow.
    query = (query * scale).reshape(batch, groups, heads // groups, queries, width)
    scores = torch.matmul(query, key[:, :, None].transpose(-1, -2)).view(batch, heads, queries, tokens)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is None and causal and queries > 1:
        mask = torch.ones(queries, tokens, dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    dtype = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.softmax(scores, -1, dtype=dtype)
    gamma = gamma.to(dtype)[:, None, None]
    weights = ((zeta - gamma) * weights + gamma).clamp(0, 1).to(query.dtype)
    weights = F.dropout(weights, dropout, module.training)
    found = torch.matmul(weights.view(batch, groups, heads // groups, queries, tokens), value[:, :, None])
    return found.view(batch, heads, queries, -1).transpose(1, 2).contiguous(), weights


class OptionalParts(nn.Module):
    """For attention modules: holds the gate and the clipping of a layer, which a config may name."""

    gate: AttentionGate | None
    gamma: torch.Tensor | None
    gammas: list[float] | None

    def add_optional_parts(self, config, layer_idx, value_dim):
        """Make `gate`, and the buffer `gamma`; None where the config has none."""
        gates, gammas = config.attention_gates, config.gammas(layer_idx)
        heads = config.num_attention_heads
        self.gate = None if gates is None else AttentionGate(
            hidden_size=config.hidden_size, heads=heads, value_dim=value_dim, **gates
        )  # fmt: skip
        self.gammas, self.zeta = gammas, 1.0 if gammas is None else config.clipped_softmax.get("zeta", 1.0)
        gamma = None if gammas is None else torch.tensor(gammas, dtype=torch.float32)
        self.register_buffer("gamma", gamma, persistent=False)  # the config is what holds it

    def _apply(self, fn, recurse=True):
        """Keep `gamma` in fp32 where a module is cast: a 16-bit one would be another threshold."""
        super()._apply(fn, recurse)
        if self.gamma is not None:
            self.gamma = torch.tensor(self.gammas, dtype=torch.float32, device=self.gamma.device)
        return self

    def clipped(self, attention):
        """Return what clips softmax in the place of the attention function that the config names, if anything does.

        transformers' own don't clip, so `clipped_attention` stands in for sdpa and eager; ours are told how.
        Raises `ValueError` for an implementation that can't clip.
        """
        if self.gamma is None:
            return attention
        name = self.config._attn_implementation
        if name in ("eager", "sdpa"):
            attention = clipped_attention
        elif not name.startswith("reattend"):
            raise ValueError(f"clipped softmax runs with attn_implementation 'eager' or 'sdpa', not {name!r}")
        return functools.partial(attention, gamma=self.gamma, zeta=self.zeta)

    def row_options(self, row):
        """Return what leaves a leader's scores for its followers: attention of reattend's alone takes it."""
        ours = self.config._attn_implementation in ("reattend", "reattend_int8", "reattend_int8_simulated")
        return {"shared_row": row} if row is not None and ours else {}

    def gated(self, hidden_BSE, found_BSHV):
        """Apply the gate, if there is one."""
        return found_BSHV if self.gate is None else self.gate(hidden_BSE, found_BSHV)


def init_optional_parts(module, std):
    """To be called by `_init_weights` of a model for each of its modules."""
    if isinstance(module, AttentionGate):
        module.reset(std)
    if isinstance(module, OptionalParts) and module.gamma is not None:
        init.copy_(module.gamma, torch.tensor(module.gammas, dtype=module.gamma.dtype))
