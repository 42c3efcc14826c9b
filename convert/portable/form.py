"""A source as a portable model: its config, and the files of code that an output brings along.

Tensors keep their names and shapes: only `config.json` changes, and what a step adds.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from reattend.errors import Refusal
from reattend.families.portable import FORMAT, PORTABLE
from reattend.families.rows import is_portable
from reattend.families.source import Source

# model type of a source -> that of its portable form, and the architectures that have one
_FORMS = {
    "llama": ("reattend", {"LlamaForCausalLM": "ReattendForCausalLM"}),
    "mistral": ("reattend", {"MistralForCausalLM": "ReattendForCausalLM"}),
    "qwen2": ("reattend", {"Qwen2ForCausalLM": "ReattendForCausalLM"}),
    "qwen3": ("reattend", {"Qwen3ForCausalLM": "ReattendForCausalLM"}),
    "opt": ("reattend_opt", {"OPTForCausalLM": "ReattendOPTForCausalLM"}),
    "bert": ("reattend_bert", {"BertForMaskedLM": "ReattendBertForMaskedLM", "BertModel": "ReattendBertModel"}),
}
# What the Llama family's config classes work out from older or missing keys, and is written out in full.
_WORKED_OUT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "use_cache", "tie_word_embeddings", "rope_parameters", "attention_dropout", "pad_token_id", "bos_token_id",
    "eos_token_id",
)  # fmt: skip
_REPLACED = ("rope_theta", "rope_scaling", "use_sliding_window", "max_window_layers", "torch_dtype")
_LAYER_TYPES = ("full_attention", "sliding_attention")


def check_portable(source: Source, step: str) -> None:
    """Refuse a source that has no portable form."""
    config, family = source.config, source.family
    if is_portable(family.model_type):
        return
    if family.model_type not in _FORMS:
        raise Refusal(f"{step}: {family.model_type} has no portable form ({', '.join(_FORMS)} have)")
    if config.get("auto_map"):
        raise Refusal("config.json: auto_map: the source brings code of its own")
    if config.get("quantization_config"):
        raise Refusal("config.json: quantization_config: convert first, quantise after")
    _architecture(source)
    if _FORMS[family.model_type][0] == "reattend":
        _llama_keys(source)


def portable_config(source: Source, parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a source's portable form, with the optional `parts` switched on.

    Raises `Refusal` for what `check_portable` refuses.
    """
    if is_portable(source.family.model_type):
        return {**source.config, **parts}
    kind = _FORMS[source.family.model_type][0]
    config = {key: value for key, value in source.config.items() if key not in _REPLACED}
    if kind == "reattend":
        config |= _llama_keys(source)
    dtype = source.config.get("torch_dtype")
    return config | ({"dtype": dtype} if dtype and "dtype" not in config else {}) | {
        "model_type": kind,
        "architectures": [_architecture(source)],
        "auto_map": PORTABLE[kind].auto_map,
        "reattend_format": FORMAT,
        **parts,
    }  # fmt: skip


def code_files(source: Source) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of the code that the portable form of a source runs on."""
    model_type = source.family.model_type
    kind = model_type if is_portable(model_type) else _FORMS[model_type][0]
    yield from PORTABLE[kind].code()


def _architecture(source: Source) -> str:
    names = source.config.get("architectures") or []
    known = _FORMS[source.family.model_type][1]
    if not names:
        return next(iter(known.values()))
    if not isinstance(names, list) or names[0] not in known:
        raise Refusal(f"config.json: architectures: {names!r} has no portable form ({', '.join(known)} have)")
    return known[names[0]]


def _llama_keys(source: Source) -> dict[str, Any]:
    """Return what a portable config says of a member of the Llama family."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    stock = _stock_config(source)
    types = getattr(stock, "layer_types", None)
    window = getattr(stock, "sliding_window", None)
    if types is None:
        types = [_LAYER_TYPES[window is not None]] * stock.num_hidden_layers
    if not isinstance(types, list) or len(types) != stock.num_hidden_layers or not set(types) <= set(_LAYER_TYPES):
        raise Refusal(f"config.json: layer_types: expected {' or '.join(_LAYER_TYPES)} for each layer")
    rope = stock.rope_parameters
    if rope.get("rope_type") not in ("default", *ROPE_INIT_FUNCTIONS):
        raise Refusal(f"config.json: rope_parameters: rope_type {rope.get('rope_type')!r} is unknown to transformers")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise Refusal("config.json: rope_parameters: the portable model rotates heads whole")
    name = source.family.model_type
    biased = bool(getattr(stock, "attention_bias", False))
    return {
        **{key: getattr(stock, key) for key in _WORKED_OUT},
        "head_dim": source.head_dim,
        "layer_types": types,
        "sliding_window": window if "sliding_attention" in types else None,
        "attention_bias": biased or name == "qwen2",
        "output_bias": biased,
        "mlp_bias": bool(getattr(stock, "mlp_bias", False)),
        "qk_norm": name == "qwen3",
    }


def _stock_config(source: Source) -> Any:
    """Return the config as transformers' own class reads it, with its defaults."""
    from transformers import AutoConfig

    keys = {key: value for key, value in source.config.items() if key not in ("model_type", "architectures")}
    try:
        return AutoConfig.for_model(source.family.model_type, **keys)
    except Exception as error:  # each config class has its own
        raise Refusal(f"config.json: transformers can't read it: {' '.join(str(error).split())[:200]}") from error
