"""Configurations of the portable models. Copied into checkpoints: needs transformers only.

Each is a stock configuration and what a stock architecture has no key for:

    attention_gates   {"kind": ..., "hidden": ...} or None: see `attention_reattend.AttentionGate`
    clipped_softmax   {"zeta": .., "gamma": one number, or per layer a list of one per head} or None
    latent_attention  {"rank": one number or one per layer, "rope_dim": .., "pairs": per layer the frequencies, as
                      indices into the model's, that turn its rotary numbers} or None: see `latent_reattend`
    attention_sharing per layer the earlier layer whose queries and keys it attends with, or None; see
                      `sharing_reattend`
    attention_drop    the layers without attention, or None
    weight_dictionary {"solver": "svd", "basis", "pca" or "als", "blocks": the first layer of each block, "atoms":
                      {projection: per block}, "ranks": {projection: per layer, None for a whole matrix}} or None; see
                      `dictionary_reattend`
"""

import math

from huggingface_hub.dataclasses import strict
from transformers import BertConfig, LlamaConfig, OPTConfig

FORMAT = 1  # rises when older code could no longer run what newer code writes


def wrong_sharing(leaders: list | None, dropped: list | None, layer_types: list[str]) -> str | None:
    """Return what is wrong with `attention_sharing` and `attention_drop`, in one line; None where nothing is."""
    layers, dropped = len(layer_types), [] if dropped is None else dropped
    leaders = [None] * layers if leaders is None else leaders
    first = {layer_types.index(kind) for kind in layer_types}
    if any(type(layer) is not int or not 0 <= layer < layers for layer in dropped) or len(set(dropped)) < len(
        dropped
    ):
        return f"attention_drop: expected different layers from 0 to {layers - 1}"
    if any(layer in first for layer in dropped):
        return f"attention_drop: layers {sorted(first)}, the first of their types, tell the length of the cache"
    if len(leaders) != layers or any(leader is not None and type(leader) is not int for leader in leaders):
        return f"attention_sharing: expected a layer or null for each of {layers} layers"
    for layer, leader in enumerate(leaders):
        if leader is None:
            continue
        if not 0 <= leader < layer or leaders[leader] is not None or leader in dropped or layer in dropped:
            return f"attention_sharing: layer {layer} can't follow {leader}, which has to attend by itself before it"
        if layer_types[leader] != layer_types[layer]:
            return f"attention_sharing: layers {leader} and {layer} attend in different ways (layer_types)"
    return None


def wrong_dictionary(how: dict | None, layers: int) -> str | None:
    """Return what is wrong with `weight_dictionary`, in one line; None where nothing is."""
    if how is None:
        return None
    if how.get("solver") not in ("svd", "basis", "pca", "als"):
        return f"weight_dictionary: solver {how.get('solver')!r} is unknown"
    blocks, atoms, ranks = (how.get(name) for name in ("blocks", "atoms", "ranks"))
    if (
        not isinstance(blocks, list)
        or not blocks
        or blocks[0] != 0
        or blocks != sorted({*blocks})
        or blocks[-1] >= layers
    ):
        return f"weight_dictionary: blocks: expected rising layers from 0 to below {layers}"
    for key, found in (("atoms", atoms), ("ranks", ranks)):
        if not isinstance(found, dict) or set(found) != {"q_proj", "k_proj", "v_proj", "o_proj"}:
            return f"weight_dictionary: {key}: expected q_proj, k_proj, v_proj and o_proj"
    for name, row in atoms.items():
        if not isinstance(row, list) or len(row) != len(blocks) or any(type(n) is not int or n < 0 for n in row):
            return f"weight_dictionary: atoms: {name}: expected a number for each block"
    for name, row in ranks.items():
        if (
            not isinstance(row, list)
            or len(row) != layers
            or any(r is not None and (type(r) is not int or r < 1) for r in row)
        ):
            return f"weight_dictionary: ranks: {name}: expected a rank or null for each of {layers} layers"
    return None


class _Optional:
    """What the configurations have in common."""

    num_attention_heads: int
    num_hidden_layers: int
    attention_gates: dict | None
    clipped_softmax: dict | None
    reattend_format: int

    def check_optional_parts(self) -> None:
        """Raise `ValueError` for a format or an optional part that this code does not know."""
        if self.reattend_format != FORMAT:
            raise ValueError(f"reattend_format is {self.reattend_format!r}, and this code knows {FORMAT}")
        clipping = self.clipped_softmax
        if clipping is not None:
            gamma, zeta = clipping.get("gamma"), clipping.get("zeta", 1.0)
            rows = gamma if isinstance(gamma, list) else [[gamma] * self.num_attention_heads] * self.num_hidden_layers
            lengths = [len(row) if isinstance(row, list) else 0 for row in rows]
            values = [zeta, *(value for row in rows if isinstance(row, list) for value in row)]
            numbers = all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)
            if lengths != [self.num_attention_heads] * self.num_hidden_layers or not numbers:
                raise ValueError("clipped_softmax: gamma is neither a number nor one per head in a list per layer")
            if zeta < 1 or any(value > 0 for value in values[1:]):
                raise ValueError("clipped_softmax: zeta is below 1 or a gamma above 0")

    def gammas(self, layer: int) -> list[float] | None:
        """Return the gamma of each head of a layer, or None where softmax is not clipped."""
        if self.clipped_softmax is None:
            return None
        gamma = self.clipped_softmax["gamma"]
        return list(gamma[layer]) if isinstance(gamma, list) else [gamma] * self.num_attention_heads


@strict
class ReattendConfig(_Optional, LlamaConfig):
    """The Llama family: Llama, Mistral, Qwen2, Qwen3. `layer_types` says which layers attend in a window.

    `attention_bias` is that of q_proj, k_proj and v_proj, `output_bias` that of o_proj.
    """

    model_type = "reattend"
    base_model_tp_plan = {
        **LlamaConfig.base_model_tp_plan,
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.gate.proj": "colwise",
    }

    output_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    attention_gates: dict | None = None
    clipped_softmax: dict | None = None
    latent_attention: dict | None = None
    attention_sharing: list | None = None
    attention_drop: list[int] | None = None
    weight_dictionary: dict | None = None
    reattend_format: int = FORMAT

    def __post_init__(self, **kwargs):
        """Fill in `layer_types`; see the class."""
        if self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        super().__post_init__(**kwargs)
        self.check_optional_parts()
        if self.latent_attention is not None:
            self._check_latent_attention(self.latent_attention)
        wrong = wrong_sharing(self.attention_sharing, self.attention_drop, self.layer_types)
        if wrong is None and self.latent_attention is not None and (self.attention_sharing or self.attention_drop):
            wrong = "latent_attention: is neither shared between layers nor dropped"
        wrong = wrong or wrong_dictionary(self.weight_dictionary, self.num_hidden_layers)
        if self.weight_dictionary and (self.latent_attention or self.attention_sharing or self.attention_drop):
            wrong = "weight_dictionary: goes with no latent, shared or dropped attention"
        if wrong is not None:
            raise ValueError(wrong)

    def _check_latent_attention(self, latent: dict) -> None:
        layers, rank, pairs = self.num_hidden_layers, latent["rank"], latent["pairs"]
        ranks = rank if isinstance(rank, list) else [rank] * layers
        if len(ranks) != layers or any(type(one) is not int or one < 1 for one in ranks):
            raise ValueError("latent_attention: rank is neither a positive whole number nor one per layer")
        count = latent["rope_dim"] / 2
        if len(pairs) != layers or any(len(row) != count for row in pairs):
            raise ValueError("latent_attention: pairs are not rope_dim / 2 in a list per layer")
        if not all(type(pair) is int and 0 <= pair < self.head_dim // 2 for row in pairs for pair in row):
            raise ValueError("latent_attention: pairs holds what is no index of a frequency")

    def latent_rank(self, layer: int) -> int:
        """Return the numbers of a layer's latent (0 without one)."""
        rank = (self.latent_attention or {"rank": 0})["rank"]
        return int(rank[layer] if isinstance(rank, list) else rank)

    def validate_architecture(self):
        """Heads need not fill the hidden size: `head_dim` says how wide they are."""


@strict
class ReattendOPTConfig(_Optional, OPTConfig):
    """OPT with optional parts."""

    model_type = "reattend_opt"
    attention_gates: dict | None = None
    clipped_softmax: dict | None = None
    reattend_format: int = FORMAT

    def __post_init__(self, **kwargs):
        """See the class."""
        super().__post_init__(**kwargs)
        self.check_optional_parts()


@strict
class ReattendBertConfig(_Optional, BertConfig):
    """BERT with optional parts."""

    model_type = "reattend_bert"
    attention_gates: dict | None = None
    clipped_softmax: dict | None = None
    reattend_format: int = FORMAT

    def __post_init__(self, **kwargs):
        """See the class."""
        super().__post_init__(**kwargs)
        self.check_optional_parts()
