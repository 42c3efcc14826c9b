"""What a config says of an int8 checkpoint: read strictly, every oddity refused by its key."""

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeGuard

from reattend.errors import Refusal
from reattend.quantize.int8.formats import Format

_OURS = 'expected {"mode": "static"} or {"mode": "dynamic", "threshold": a number above 0}'


def declared_outliers(config: Mapping[str, Any]) -> tuple[Literal["none", "static", "dynamic"], float]:
    """Return what `int8_outliers`, our own key, says: the mode, and the threshold of dynamic outliers or 0."""
    value = config.get("int8_outliers")
    if value is None:
        return "none", 0.0
    if value == {"mode": "static"}:
        return "static", 0.0
    threshold = value.get("threshold") if isinstance(value, dict) else None
    if value == {"mode": "dynamic", "threshold": threshold} and _is_number(threshold) and threshold > 0:
        return "dynamic", float(threshold)
    raise Refusal(f"config.json: int8_outliers: {_OURS}")


def scheme(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `Int8Linear`'s options from a config's `quantization_config`; refuse what is not int8 per channel."""
    declared = _object(config.get("quantization_config") or {}, "quantization_config")
    method = declared.get("quant_method")
    mode, threshold = declared_outliers(config)
    if method == "bitsandbytes":
        bitsandbytes = _threshold(declared)
        return {"activations": "int8", "threshold": None if mode == "static" else bitsandbytes or None}
    if method != "compressed-tensors":
        raise Refusal(f"config.json: quant_method {method!r} is not compressed-tensors or bitsandbytes")
    groups = _object(declared.get("config_groups") or {}, "config_groups")
    if len(groups) != 1:
        raise Refusal(f"config.json: {len(groups)} config_groups; one int8 group is what runs here")
    ((name, group),) = groups.items()
    return {"activations": _activations(_object(group, f"config_groups.{name}")), "threshold": threshold or None}


def layout_of(config: Mapping[str, Any]) -> Format:
    """Return the layout of an int8 checkpoint. Raises `Refusal` for what `scheme` refuses."""
    activations = scheme(config)["activations"]
    if config["quantization_config"]["quant_method"] == "bitsandbytes":
        return "bitsandbytes"
    return "int-quantized" if activations == "int8" else "pack-quantized"


def _threshold(declared: Mapping[str, Any]) -> float:
    if declared.get("load_in_8bit") is not True:
        raise Refusal("config.json: quantization_config: bitsandbytes, but not load_in_8bit")
    threshold = declared.get("llm_int8_threshold", 6.0)
    if not _is_number(threshold) or threshold < 0:
        raise Refusal(f"config.json: llm_int8_threshold is {threshold!r}, expected a number from 0 on")
    return float(threshold)


def _activations(group: Mapping[str, Any]) -> str:
    int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    _require(group, "weights", {**int8, "strategy": "channel"})
    if group.get("input_activations") is None:
        return "none"
    _require(group, "input_activations", {**int8, "strategy": "token", "dynamic": True})
    return "int8"


def _require(group: Mapping[str, Any], part: str, wanted: Mapping[str, Any]) -> None:
    declared = _object(group.get(part) or {}, part)
    for key, value in wanted.items():
        if declared.get(key) != value:
            raise Refusal(f"config.json: {part}.{key} is {declared.get(key)!r}, not {value!r}")


def _object(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Refusal(f"config.json: {key} is not a JSON object")
    return value


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
