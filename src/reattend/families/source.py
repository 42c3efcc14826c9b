"""A model as transforms see it: config, family row and tensor specs, checked against each other."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

from reattend.checkpoint.header import BITS, TensorSpec
from reattend.checkpoint.index import Checkpoint
from reattend.errors import Refusal
from reattend.families.portable import portable_classes
from reattend.families.rows import FAMILIES, WITH_QUERY_LATENT, Family, is_portable, portable_row

_PACKED = ".weight_packed"
# What quantisers store beside a weight, to decode it or to scale what it meets: part of the format, not of the model.
_DECODING = frozenset({
    "SCB", "weight_format", "weight_scale", "weight_scale_inv", "weight_global_scale", "weight_zero_point",
    "weight_shape", "weight_g_idx", "input_scale", "input_global_scale", "input_zero_point", "output_scale",
    "output_zero_point",
})  # fmt: skip


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
        outer, _, inner = key.partition(".")
        value = self.config.get(outer)
        if inner and isinstance(value, Mapping):
            value = value.get(inner)
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
        if "latent" in self.family.features:
            return sum(self.size("latent+rope", layer) for layer in range(self.num_layers))
        absent = [name for names in self.family.absent.values() for name in names]
        missing = sum(absent.count(f"self_attn.{name}_proj") for name in "kv")
        return (2 * self.num_layers - missing) * self.num_kv_heads * self.head_dim

    @property
    def parameters(self) -> int:
        """Numbers of the model, however they are stored: see `numbers`; exact for the linear layers of the row."""
        shapes = {module + _PACKED: shape for module, shape in self.linears()}
        packed = {name: math.prod(shape) for name, shape in shapes.items() if name in self.tensors}
        rest = (numbers(spec, self.config) for name, spec in self.tensors.items() if name not in packed)
        return sum(packed.values()) + sum(rest)

    def size(self, symbols: str, layer: int | None = None) -> int:
        """Evaluate a dimension such as `q+kv+kv`; one that layers differ in needs a `layer`."""
        return sum(self._size(symbol, layer) for symbol in symbols.split("+"))

    def _size(self, symbol: str, layer: int | None) -> int:
        products = {
            "q": lambda: int(self.get("heads")) * self.head_dim,
            "kv": lambda: self.num_kv_heads * self.head_dim,
            "ffn": lambda: int(self.get("ffn") or 4 * self.get("hidden")),  # GPT-2 writes null for 4 x hidden
            "qk": lambda: int(self.get("heads")) * self.size("free+rope"),
            "up": lambda: int(self.get("heads")) * self.size("free+value_dim"),
            "values": lambda: int(self.get("heads")) * self.size("value_dim"),
        }
        if symbol in products:
            return products[symbol]()
        value = self.get(symbol)
        return int(value[layer] if isinstance(value, list) and layer is not None else value)

    def layer_prefix(self, layer: int | str) -> str:
        """Return what the names of a layer's tensors begin with, as `model.layers.3.`."""
        return f"{self.prefix}{self.family.layer}.{layer}."

    @cached_property
    def linear_shapes(self) -> Mapping[str, tuple[int, int]]:
        """The weight shapes of `linears` by module, looked up often: worked out once."""
        return dict(self.linears())

    def linears(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield (module name, weight shape as stored) of every linear layer of every layer."""
        for layer in range(self.num_layers):
            for name, (rows, columns) in self.family.linears.items():
                if name not in (*self.family.absent.get(layer, ()), *self.family.factored.get(layer, ())):
                    yield self.layer_prefix(layer) + name, (self.size(rows, layer), self.size(columns, layer))


def source_of(checkpoint: Checkpoint) -> Source:
    """Find the family and check that config and tensors agree. Raises `Refusal` naming file and key or tensor."""
    specs = {name: stored.spec for name, stored in checkpoint.tensors.items()}
    shards = {name: stored.file for name, stored in checkpoint.tensors.items()}
    try:
        return describe(checkpoint.config, specs, shards)
    except Refusal as refusal:
        raise Refusal(f"{checkpoint.files.name}/{refusal}") from refusal


def describe(
    config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], shards: Mapping[str, str] = MappingProxyType({})
) -> Source:
    """The same for a config and tensor specs, which may be on no disk yet; `shards` maps names to their files."""
    model_type = config.get("model_type")
    family = _family(config)
    if family is None:
        raise Refusal(f"config.json: model_type {model_type!r} is not among {', '.join(FAMILIES)}")
    suffix = f"{family.embedding}.weight"
    prefix = family.prefix if family.prefix + suffix in tensors else ""
    source = Source(config, family, tensors, prefix)
    _check_keys(source)
    expected = dict(source.linears())
    if "projected_embedding" not in family.features:
        expected[prefix + family.embedding] = (source.size("vocab"), source.size("hidden"))
    for module, shape in expected.items():
        _check_weight(source, module, shape, shards)
    return source


def _check_weight(source: Source, module: str, shape: tuple[int, int], shards: Mapping[str, str]) -> None:
    packed = module + _PACKED in source.tensors and bool(source.config.get("quantization_config"))
    name = module + _PACKED if packed else f"{module}.weight"
    if name not in source.tensors:
        raise Refusal(f"config.json: promises tensor {name!r}, which is missing")
    spec = source.tensors[name]
    if spec.shape not in (_packed_shapes(spec, shape, source.config) if packed else {shape}):
        where = f"{shards[name]}: " if name in shards else ""
        says = f"config.json says {list(shape)}{' in another num_bits' if packed else ''}"
        raise Refusal(f"{where}tensor {name!r} has shape {list(spec.shape)}, {says}")


def numbers(spec: TensorSpec, config: Mapping[str, Any]) -> int:
    """Return how many of the model's numbers a stored tensor holds.

    In a quantised checkpoint an element of compressed-tensors' `weight_packed` holds several codes: the count is
    an upper bound where rows do not fill their last word, or where groups differ in width. Scales, zero points,
    shapes and formats hold none, in compressed-tensors, bitsandbytes and fp8 alike: they say how a weight is stored.
    """
    if not config.get("quantization_config"):
        return spec.numel
    if spec.name.rpartition(".")[2] in _DECODING:
        return 0
    return spec.nbytes * 8 // min(_widths(spec, config)) if spec.name.endswith(_PACKED) else spec.numel


def _widths(packed: TensorSpec, config: Mapping[str, Any]) -> set[int]:
    """Return the bits that a code in a packed tensor may have: one width or several among the groups."""
    declared = config["quantization_config"]
    groups = declared.get("config_groups") if isinstance(declared, dict) else None
    schemes = [g.get("weights") for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    widths = [scheme.get("num_bits") for scheme in schemes if isinstance(scheme, dict)]
    known = [width for width in widths if type(width) is int and 0 < width <= BITS[packed.dtype]]
    if not known or len(known) < len(widths):
        key = "quantization_config: config_groups"
        raise Refusal(
            f"config.json: {key}: num_bits of tensor {packed.name!r} is missing or does not fit {packed.dtype}"
        )
    return set(known)


def _family(config: Mapping[str, Any]) -> Family | None:
    name = config.get("model_type")
    if is_portable(name):
        portable_classes(config)  # refuses a format that is not known here
        return portable_row(config)
    if name == "deepseek_v3":
        if config.get("first_k_dense_replace") != config.get("num_hidden_layers"):
            raise Refusal("config.json: first_k_dense_replace: deepseek_v3 with experts is not supported")
        if config.get("q_lora_rank"):
            return WITH_QUERY_LATENT
    return FAMILIES.get(name) if isinstance(name, str) else None


def _check_keys(source: Source) -> None:
    optional = {"kv_heads", "head_dim", "experts"}
    if source.family.model_type == "gpt2":
        optional |= {"ffn"}
    for symbol, key in source.family.keys.items():
        value = source.get(symbol)
        if value is None and symbol in optional:
            continue
        if symbol == "latent" and isinstance(value, list):
            _check_per_layer(source, key, value)
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise Refusal(f"config.json: {key} is {value!r}, expected a positive whole number")
    if not isinstance(source.get("tie_word_embeddings"), bool):
        raise Refusal("config.json: tie_word_embeddings is neither true nor false")


def _check_per_layer(source: Source, key: str, values: list[Any]) -> None:
    if len(values) != source.num_layers or not all(type(value) is int and value > 0 for value in values):
        raise Refusal(f"config.json: {key} is a list, expected {source.num_layers} positive whole numbers")


def _packed_shapes(packed: TensorSpec, shape: tuple[int, int], config: Mapping[str, Any]) -> set[tuple[int, int]]:
    """Return the shapes in which a weight of `shape` may be packed, by the widths that the config declares."""
    rows, columns = shape
    bits = BITS[packed.dtype]
    # A code may go on in the next word, or, as older versions packed, leave the rest of a word empty.
    counts = ((-(-columns * width // bits), -(-columns // (bits // width))) for width in _widths(packed, config))
    return {(rows, count) for pair in counts for count in pair}
