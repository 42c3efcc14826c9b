"""What reattend knows of each model family, as data: one frozen row per `model_type`.

A row says how tensors are named and shaped and what the family has (biases, norms, windows, experts), so
that a transform can refuse by name. Dimension symbols in shapes: `hidden`, `q` (query heads x head_dim),
`kv` (KV heads x head_dim), `ffn`, `vocab`, `experts`; for latent attention `qk` (query heads x both query parts),
`latent`, `rope`, `up` (query heads x position-free keys and values), `values`, `query_latent`. A sum such as
`q+kv+kv` is a fused output. A key such as `latent_attention.rank` is a key within a key of the config; what it holds
may be a list, one per layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from reattend.errors import Refusal


@dataclass(frozen=True)
class Feed:
    """A module whose output, channel by channel, is the input of some linears and of nothing else.

    Dividing `producer`'s channels by any s > 0 and multiplying the consumers' columns by it changes nothing.
    `rows` are the producer's output rows in question, as dimension symbols (start, stop), where it is fused with
    others. A norm that computes with 1 + weight is no producer: (1 + w) / s - 1 does not fit into 16 bit.
    """

    producer: str
    consumers: tuple[str, ...]
    rows: tuple[str, str] | None = None


@dataclass(frozen=True)
class Family:
    """One row. `linears` maps a module name inside a layer to its (out, in) dimension symbols.

    `attention` is the module that computes attention; `attention_output` and `feed_forward_output` are the linears
    whose outputs the residual stream takes up; a family with experts has none of the latter name. `absent` says which
    linears some layers lack, `factored` which are stored as factors.
    """

    model_type: str
    prefix: str
    layer: str
    embedding: str
    linears: Mapping[str, tuple[str, str]]
    features: frozenset[str] = frozenset()
    head: str | None = "lm_head"
    keys: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    feeds: tuple[Feed, ...] = ()
    attention: str = "self_attn"
    attention_output: str = "self_attn.o_proj"
    feed_forward_output: str = "mlp.down_proj"
    absent: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    factored: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    @property
    def not_by_itself(self) -> str | None:
        """Why a layer can't be run without the others, in words that follow on "the model's"; None where it can."""
        if self.absent:
            return "layers share attention or have none"
        return "projections are stored as factors" if self.factored else None


_LLAMA_KEYS = {
    "hidden": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads", "head_dim": "head_dim", "ffn": "intermediate_size",
    "vocab": "vocab_size", "experts": "num_local_experts",
}  # fmt: skip
_ATTENTION = {
    "self_attn.q_proj": ("q", "hidden"), "self_attn.k_proj": ("kv", "hidden"),
    "self_attn.v_proj": ("kv", "hidden"), "self_attn.o_proj": ("hidden", "q"),
}  # fmt: skip
_GATED = {
    "mlp.gate_proj": ("ffn", "hidden"), "mlp.up_proj": ("ffn", "hidden"), "mlp.down_proj": ("hidden", "ffn"),
}  # fmt: skip


_VALUES = Feed("self_attn.v_proj", ("self_attn.o_proj",))
_UP = Feed("mlp.up_proj", ("mlp.down_proj",))


_PROJECTIONS = tuple(f"self_attn.{name}_proj" for name in "qkv")
_LLAMA_FEEDS = (
    Feed("input_layernorm", _PROJECTIONS),
    Feed("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    _VALUES,
    _UP,
)


def _llama_like(
    model_type: str, *features: str, linears: Any = None, feeds: tuple[Feed, ...] = _LLAMA_FEEDS, **defaults: Any
) -> Family:
    return Family(
        model_type, "model.", "layers", "embed_tokens", linears or {**_ATTENTION, **_GATED},
        frozenset(features), keys=_LLAMA_KEYS, defaults=defaults, feeds=feeds,
    )  # fmt: skip


_LATENT = {
    "self_attn.kv_a_proj_with_mqa": ("latent+rope", "hidden"), "self_attn.kv_b_proj": ("up", "latent"),
    "self_attn.o_proj": ("hidden", "values"), **_GATED,
}  # fmt: skip
_LATENT_KEYS = {
    **_LLAMA_KEYS, "latent": "kv_lora_rank", "rope": "qk_rope_head_dim", "free": "qk_nope_head_dim",
    "value_dim": "v_head_dim",
}  # fmt: skip


def _latent(queries: dict[str, tuple[str, str]], **keys: str) -> Family:
    return Family(
        "deepseek_v3", "model.", "layers", "embed_tokens", {**queries, **_LATENT}, frozenset({"latent"}),
        keys=_LATENT_KEYS | keys, defaults={"tie_word_embeddings": False}, feeds=(_UP,),
    )  # fmt: skip


# The second form of deepseek_v3, whose queries pass through a latent of their own.
WITH_QUERY_LATENT = _latent(
    {"self_attn.q_a_proj": ("query_latent", "hidden"), "self_attn.q_b_proj": ("qk", "query_latent")},
    query_latent="q_lora_rank",
)

_BERT_ATTENTION = {f"attention.self.{n}": ("hidden", "hidden") for n in ("query", "key", "value")}

_STOCK = {
    row.model_type: row
    for row in (
        _llama_like("llama", tie_word_embeddings=False),
        _llama_like("mistral", "window", num_key_value_heads=8, tie_word_embeddings=False),
        _llama_like("qwen2", "qkv_bias", "window", num_key_value_heads=32, tie_word_embeddings=False),
        _llama_like(
            "qwen3", "qk_norm", "window",
            num_key_value_heads=32, head_dim=128, tie_word_embeddings=False,
        ),
        _llama_like(
            "gemma2", "soft_cap", "window", "bos_every_window",
            feeds=(_VALUES, _UP),
            num_key_value_heads=4, head_dim=256, tie_word_embeddings=True,
        ),
        _llama_like(
            "phi3", "fused_qkv", "partial_rotary", "window",
            linears={
                "self_attn.qkv_proj": ("q+kv+kv", "hidden"), "self_attn.o_proj": ("hidden", "q"),
                "mlp.gate_up_proj": ("ffn+ffn", "hidden"), "mlp.down_proj": ("hidden", "ffn"),
            },
            feeds=(
                Feed("input_layernorm", ("self_attn.qkv_proj",)),
                Feed("post_attention_layernorm", ("mlp.gate_up_proj",)),
                Feed("self_attn.qkv_proj", ("self_attn.o_proj",), rows=("q+kv", "q+kv+kv")),
                Feed("mlp.gate_up_proj", ("mlp.down_proj",), rows=("ffn", "ffn+ffn")),
            ),
            tie_word_embeddings=False,
        ),
        _llama_like(
            "mixtral", "experts", "window",
            linears={**_ATTENTION, "block_sparse_moe.gate": ("experts", "hidden")},
            feeds=(), num_key_value_heads=8, tie_word_embeddings=False,
        ),
        _latent({"self_attn.q_proj": ("qk", "hidden")}),
        Family(
            "opt", "model.decoder.", "layers", "embed_tokens",
            {
                **{f"self_attn.{n}": ("hidden", "hidden") for n in ("q_proj", "k_proj", "v_proj", "out_proj")},
                "fc1": ("ffn", "hidden"), "fc2": ("hidden", "ffn"),
            },
            frozenset({"qkv_bias", "learned_positions", "projected_embedding"}),  # to another width than hidden
            keys={**_LLAMA_KEYS, "ffn": "ffn_dim"},
            defaults={"tie_word_embeddings": True, "do_layer_norm_before": True, "activation_function": "relu"},
            feeds=(
                Feed("self_attn_layer_norm", _PROJECTIONS),
                Feed("final_layer_norm", ("fc1",)),
                Feed("self_attn.v_proj", ("self_attn.out_proj",)),
                Feed("fc1", ("fc2",)),  # through a ReLU, which passes positive factors
            ),
            attention_output="self_attn.out_proj", feed_forward_output="fc2",
        ),
        Family(
            "gpt2", "transformer.", "h", "wte",
            # Conv1D stores (in, out): the symbols are swapped accordingly.
            {
                "attn.c_attn": ("hidden", "hidden+hidden+hidden"), "attn.c_proj": ("hidden", "hidden"),
                "mlp.c_fc": ("hidden", "ffn"), "mlp.c_proj": ("ffn", "hidden"),
            },
            frozenset({"fused_qkv", "conv1d", "learned_positions", "qkv_bias"}),
            keys={
                "hidden": "n_embd", "layers": "n_layer", "heads": "n_head", "ffn": "n_inner",
                "vocab": "vocab_size",
            },
            defaults={"tie_word_embeddings": True},
            attention="attn", attention_output="attn.c_proj", feed_forward_output="mlp.c_proj",
        ),
        Family(
            "bert", "bert.", "encoder.layer", "embeddings.word_embeddings",
            {
                **_BERT_ATTENTION, "attention.output.dense": ("hidden", "hidden"),
                "intermediate.dense": ("ffn", "hidden"), "output.dense": ("hidden", "ffn"),
            },
            frozenset({"encoder", "qkv_bias", "learned_positions"}),
            head="cls.predictions.decoder", keys=_LLAMA_KEYS, defaults={"tie_word_embeddings": True},
            attention="attention.self",
            attention_output="attention.output.dense", feed_forward_output="output.dense",
        ),
    )
}  # fmt: skip

# The portable models by the rows whose names and shapes they have.
_PORTABLE = {
    "reattend": _llama_like("reattend", tie_word_embeddings=False),
    "reattend_opt": replace(_STOCK["opt"], model_type="reattend_opt"),
    "reattend_bert": replace(_STOCK["bert"], model_type="reattend_bert"),
}
FAMILIES = _STOCK | _PORTABLE
# What a portable config switches on, as features.
_SWITCHES = {
    "attention_bias": "qkv_bias", "qk_norm": "qk_norm", "sliding_window": "window", "attention_gates": "gates",
    "clipped_softmax": "clipped_softmax", "latent_attention": "latent", "attention_sharing": "attention_sharing",
    "attention_drop": "attention_drop", "weight_dictionary": "weight_dictionary",
}  # fmt: skip
# The portable model with latent attention; with norms, queries and rows are mapped behind them.
_ROWS = "self_attn.kv_a_proj_with_mqa"
_PORTABLE_LATENT = {
    "self_attn.q_proj": ("qk", "hidden"), _ROWS: ("latent+rope", "hidden"), "self_attn.kv_b_proj": ("up", "latent"),
    "self_attn.o_proj": ("hidden", "values"), **_GATED,
}  # fmt: skip
_PORTABLE_LATENT_NORMED = {**_PORTABLE_LATENT, **_ATTENTION, _ROWS: ("latent+rope", "kv+kv")}
_PORTABLE_LATENT_KEYS = {
    **_LLAMA_KEYS, "latent": "latent_attention.rank", "rope": "latent_attention.rope_dim", "free": "head_dim",
    "value_dim": "head_dim",
}  # fmt: skip


def portable_row(config: Mapping[str, Any]) -> Family:
    """Return the row of a portable model, with the features that its config switches on."""
    row = _PORTABLE[config["model_type"]]
    if config.get("latent_attention") is not None:
        linears = _PORTABLE_LATENT_NORMED if config.get("qk_norm") else _PORTABLE_LATENT
        row = replace(row, linears=linears, keys=_PORTABLE_LATENT_KEYS, feeds=(*_LLAMA_FEEDS[1:2], _UP))
    features = {feature for key, feature in _SWITCHES.items() if config.get(key) not in (None, False)}
    # A gate reads what the attention's norm puts out, too, and not always through a linear layer.
    feeds = tuple(f for f in row.feeds if "gates" not in features or f.consumers != _PROJECTIONS)
    return replace(
        row, features=row.features | features, feeds=feeds, absent=_absent(config), factored=_factored(config)
    )


def _factored(config: Mapping[str, Any]) -> dict[int, tuple[str, ...]]:
    """Return the projections that are stored as factors, by layer."""
    how = config.get("weight_dictionary")
    ranks = how.get("ranks") if isinstance(how, Mapping) else {}
    if how is not None and not (isinstance(ranks, Mapping) and all(isinstance(row, list) for row in ranks.values())):
        raise Refusal("config.json: weight_dictionary: expected ranks, a list for each projection")
    pairs = (
        (layer, name) for name, row in (ranks or {}).items() for layer, rank in enumerate(row) if rank is not None
    )
    found: dict[int, tuple[str, ...]] = {}
    for layer, name in pairs:
        found[layer] = (*found.get(layer, ()), f"self_attn.{name}")
    return found


def _absent(config: Mapping[str, Any]) -> dict[int, tuple[str, ...]]:
    """Return the projections that layers with another's attention, or with none, don't have."""
    leaders, dropped = config.get("attention_sharing"), config.get("attention_drop")
    for key, value in (("attention_sharing", leaders), ("attention_drop", dropped)):
        if value is not None and not isinstance(value, list):
            raise Refusal(f"config.json: {key}: expected a list")
    followers = (layer for layer, leader in enumerate(leaders or ()) if leader is not None)
    found = dict.fromkeys(followers, _PROJECTIONS[:2])
    return found | dict.fromkeys((layer for layer in dropped or () if type(layer) is int), tuple(_ATTENTION))


def is_portable(model_type: object) -> bool:
    """Whether a model type is one of the portable models'."""
    return isinstance(model_type, str) and model_type in _PORTABLE
