"""What the step mla refuses of a source, from headers and config."""

from reattend.convert.mla.geometry import Geometry, attention_name
from reattend.convert.mla.native import native_rope
from reattend.convert.portable.form import check_portable
from reattend.errors import Refusal
from reattend.families.source import Source

_FLOATS = ("F16", "F32", "BF16", "F64")
READ = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")
BIASES = ("q_proj.bias", "k_proj.bias", "v_proj.bias", "o_proj.bias")
# What neither form can express, by the feature that a family's row names.
_FEATURES = {
    "latent": "has latent attention already",
    "soft_cap": "caps its scores, which converted layers can't",
    "partial_rotary": "fuses its projections and may rotate a part of each head only",
    "experts": "has experts, which converted models can't hold",
    "learned_positions": "has learned positions instead of RoPE",
    "gates": "has gates already: run mla first, and the step gates on its output",
    "clipped_softmax": "clips its softmax already: run mla first, and the step clipped_softmax on its output",
}
_NATIVE = ("llama", "mistral", "qwen2")
_PORTABLE = (*_NATIVE, "qwen3", "reattend")
_WAY_OUT = "which the native format can't hold; target: portable does"


def check_native(source: Source) -> None:
    """Refuse what the native format can't hold."""
    name = source.family.model_type
    _check_features(source)
    if "qk_norm" in source.family.features:
        raise Refusal(f"mla: {name} normalises queries and keys after their projections, {_WAY_OUT}")
    if name == "reattend":
        raise Refusal(f"mla: target: {name} is portable already, so target: portable is its form")
    _check_kind(source, _NATIVE)
    _check_window(source)
    if source.config.get("mlp_bias"):
        raise Refusal(f"config.json: mlp_bias: a bias {_WAY_OUT}")
    _check_tensors(source)


def check_portable_source(source: Source) -> None:
    """Refuse what the portable form can't hold."""
    _check_features(source)
    _check_kind(source, _PORTABLE)
    check_portable(source, "mla")
    _check_tensors(source)


def _check_features(source: Source) -> None:
    for feature, reason in _FEATURES.items():
        if feature in source.family.features:
            raise Refusal(f"mla: {source.family.model_type} {reason}")


def _check_kind(source: Source, known: tuple[str, ...]) -> None:
    name = source.family.model_type
    if name not in known:
        raise Refusal(f"mla: {name} is not supported ({', '.join(known)} are)")
    if source.config.get("quantization_config"):
        raise Refusal("config.json: quantization_config: convert first, quantise after")


def _check_window(source: Source) -> None:
    window = source.config.get("sliding_window")
    used = source.config.get("use_sliding_window", source.family.model_type == "mistral")
    limit = int(source.get("max_position_embeddings") or 0)
    if window and used and int(window) < limit:
        raise Refusal(f"config.json: sliding_window: {window} is less than {limit}, {_WAY_OUT}")


def _check_tensors(source: Source) -> None:
    for layer in range(source.num_layers):
        names = [attention_name(source, layer, name) for name in (*READ, *BIASES)]
        for spec in (source.tensors[name] for name in names if name in source.tensors):
            if spec.dtype not in _FLOATS:
                raise Refusal(f"mla: tensor {spec.name!r} is {spec.dtype}, not a 16-, 32- or 64-bit float")
        biases = [attention_name(source, layer, f"{n}_proj.bias") in source.tensors for n in "qkv"]
        if len(set(biases)) != 1:
            raise Refusal(f"mla: layer {layer} has biases on some of q_proj, k_proj, v_proj only")


def check_vllm(source: Source, geometry: Geometry, rope_dim: int) -> None:
    """Refuse what vLLM's deepseek_v3 can't hold."""
    if any(attention_name(source, 0, name) in source.tensors for name in BIASES):
        raise Refusal("mla: target: vLLM's deepseek_v3 has no attention biases; use target: transformers")
    rotary = geometry.rotary
    plain = rotary.factor == 1.0 and rotary.long_frequency_F is None
    if not plain or geometry.head_dim % rope_dim:
        raise Refusal(
            f"mla: target: vLLM's deepseek_v3 has default RoPE only, so rope_dim must divide {geometry.head_dim}"
        )
    if native_rope(rotary, geometry.theta, geometry.max_positions)["rope_type"] != "default":
        raise Refusal("mla: target: vLLM's deepseek_v3 has default RoPE only; use target: transformers")
