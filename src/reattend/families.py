"""What reattend knows of each model family, as data: one frozen row per `model_type`.

A row says how tensors are named and shaped and what the family has (biases, norms, windows, experts), so
that a transform can refuse by name. Dimension symbols in shapes: `hidden`, `q` (query heads x head_dim),
`kv` (KV heads x head_dim), `ffn`, `vocab`, `experts`; a sum such as `q+kv+kv` is a fused output.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from reattend.checkpoint.header import TensorSpec
from reattend.checkpoint.index import Checkpoint
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
    """One row. `linears` maps a module name inside a layer to its (out, in) dimension symbols."""

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


_BERT_ATTENTION = {f"attention.self.{n}": ("hidden", "hidden") for n in ("query", "key", "value")}

FAMILIES = {
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
        Family(
            "opt", "model.decoder.", "layers", "embed_tokens",
            {
                **{f"self_attn.{n}": ("hidden", "hidden") for n in ("q_proj", "k_proj", "v_proj", "out_proj")},
                "fc1": ("ffn", "hidden"), "fc2": ("hidden", "ffn"),
            },
            frozenset({"qkv_bias", "learned_positions"}),
            keys={**_LLAMA_KEYS, "ffn": "ffn_dim"},
            defaults={"tie_word_embeddings": True, "do_layer_norm_before": True, "activation_function": "relu"},
            feeds=(
                Feed("self_attn_layer_norm", _PROJECTIONS),
                Feed("final_layer_norm", ("fc1",)),
                Feed("self_attn.v_proj", ("self_attn.out_proj",)),
                Feed("fc1", ("fc2",)),  # through a ReLU, which passes positive factors
            ),
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
        ),
        Family(
            "bert", "bert.", "encoder.layer", "embeddings.word_embeddings",
            {
                **_BERT_ATTENTION, "attention.output.dense": ("hidden", "hidden"),
                "intermediate.dense": ("ffn", "hidden"), "output.dense": ("hidden", "ffn"),
            },
            frozenset({"encoder", "qkv_bias", "learned_positions"}),
            head="cls.predictions.decoder", keys=_LLAMA_KEYS, defaults={"tie_word_embeddings": True},
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A model as transforms see it: config, family and tensor specs; `prefix` is the one in use."""

    config: Mapping[str, Any]
    family: Family
    tensors: Mapping[str, TensorSpec]
    prefix: str

    def get(self, symbol: str) -> Any:
        """Return the config's value of a dimension symbol, the family's default where it is absent."""
        key = self.family.keys.get(symbol, symbol)
        value = self.config.get(key)
        return self.family.defaults.get(key) if value is None else value

    @property
    def num_layers(self) -> int:
        """Decoder (or encoder) layers."""
        return int(self.get("layers"))

    @property
    def head_dim(self) -> int:
        """Numbers per attention head."""
        return int(self.get("head_dim") or self.get("hidden") // self.get("heads"))

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads."""
        return int(self.get("kv_heads") or self.get("heads"))

    @property
    def tied(self) -> bool:
        """Whether the output embedding is the input embedding."""
        return bool(self.get("tie_word_embeddings"))

    @property
    def cache_numbers_per_token(self) -> int:
        """Numbers that the KV cache holds per token, over all layers (0 for an encoder)."""
        if "encoder" in self.family.features:
            return 0
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def size(self, symbols: str) -> int:
        """Evaluate a dimension such as `q+kv+kv`."""
        return sum(self._size(symbol) for symbol in symbols.split("+"))

    def _size(self, symbol: str) -> int:
        if symbol == "q":
            return int(self.get("heads")) * self.head_dim
        if symbol == "kv":
            return self.num_kv_heads * self.head_dim
        if symbol == "ffn":
            return int(self.get("ffn") or 4 * self.get("hidden"))  # GPT-2 writes null for 4 x hidden
        return int(self.get(symbol))

    def linears(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield (module name, weight shape as stored) of every linear layer of every layer."""
        for layer in range(self.num_layers):
            for name, (rows, columns) in self.family.linears.items():
                module = f"{self.prefix}{self.family.layer}.{layer}.{name}"
                yield module, (self.size(rows), self.size(columns))


def source_of(checkpoint: Checkpoint) -> Source:
    """Find the family and check that config and tensors agree. Raises `Refusal` naming key or tensor."""
    return describe(checkpoint.config, {name: stored.spec for name, stored in checkpoint.tensors.items()})


def describe(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> Source:
    """The same for a config and tensor specs that are on no disk yet."""
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise Refusal(f"config.json: model_type {model_type!r} is not among {', '.join(FAMILIES)}")
    suffix = f"{family.embedding}.weight"
    prefix = family.prefix if family.prefix + suffix in tensors else ""
    source = Source(config, family, tensors, prefix)
    _check_keys(source)
    expected = dict(source.linears())
    if family.model_type != "opt":  # OPT may project between embedding and hidden size
        expected[prefix + family.embedding] = (source.size("vocab"), source.size("hidden"))
    for module, shape in expected.items():
        packed = tensors.get(f"{module}.weight_packed")
        if packed is None or not config.get("quantization_config"):
            _check_tensor(tensors, f"{module}.weight", shape)
        elif packed.shape[:1] != shape[:1]:
            raise Refusal(f"tensor {packed.name!r} has {packed.shape[:1]} rows, config.json says {shape[0]}")
    return source


def _check_keys(source: Source) -> None:
    optional = {"kv_heads", "head_dim", "experts"}
    if source.family.model_type == "gpt2":
        optional |= {"ffn"}
    for symbol, key in source.family.keys.items():
        value = source.get(symbol)
        if value is None and symbol in optional:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise Refusal(f"config.json: {key} is {value!r}, expected a positive whole number")
    if not isinstance(source.get("tie_word_embeddings"), bool):
        raise Refusal("config.json: tie_word_embeddings is neither true nor false")


def _check_tensor(tensors: Mapping[str, TensorSpec], name: str, shape: tuple[int, int]) -> None:
    if name not in tensors:
        raise Refusal(f"tensor {name!r} is missing, config.json promises it")
    if tensors[name].shape != shape:
        found = list(tensors[name].shape)
        raise Refusal(f"tensor {name!r} has shape {found}, config.json says {list(shape)}")
