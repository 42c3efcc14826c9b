"""How layers run quantised attention, as `config.json` says it: the key `reattend_attention`, one kind per layer."""

from collections.abc import Mapping
from typing import Any

from reattend.errors import Refusal

KEY = "reattend_attention"
# From the most exact to the fastest: names say how Q K^T and P V are computed.
EXACT, INT8_FP16, INT8_FP8 = KINDS = ("exact", "int8_fp16", "int8_fp8")


def declared_kinds(config: Mapping[str, Any]) -> list[str] | None:
    """Return each layer's kind, or None where the config declares none. Raises `Refusal` for what can't be meant."""
    kinds = config.get(KEY)
    if kinds is None:
        return None
    layers = config.get("num_hidden_layers")
    if not isinstance(kinds, list) or any(kind not in KINDS for kind in kinds):
        raise Refusal(f"config.json: {KEY} must be a list of {', '.join(KINDS)}")
    if len(kinds) != layers:
        raise Refusal(f"config.json: {KEY} has {len(kinds)} entries for {layers} layers")
    return kinds
