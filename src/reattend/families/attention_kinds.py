"""How layers run quantised attention, as `config.json` says it: the key `reattend_attention`, one kind per layer."""

from collections.abc import Mapping
from typing import Any

from reattend.errors import Refusal
from reattend.families.source import Source

KEY = "reattend_attention"
# From the most exact to the fastest: names say how Q K^T and P V are computed.
EXACT, INT8_FP16, INT8_FP8 = KINDS = ("exact", "int8_fp16", "int8_fp8")


def declared_kinds(config: Mapping[str, Any], layers: int, where: str = "config.json") -> list[str] | None:
    """Return each layer's kind, or None where the config declares none. Raises `Refusal` for what can't be meant."""
    kinds = config.get(KEY)
    if kinds is None:
        return None
    remedy = "remove the key, or run int8_attention on the source again"
    if not isinstance(kinds, list):
        raise Refusal(f"{where}: {KEY} is no list; {remedy}")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise Refusal(f"{where}: {KEY} holds {unknown[0]!r}, none of {', '.join(KINDS)}; {remedy}")
    if len(kinds) != layers:
        raise Refusal(f"{where}: {KEY} has {len(kinds)} entries for {layers} layers; {remedy}")
    return kinds


def check_kinds(folder: str, source: Source) -> None:
    """Refuse a source whose config declares what `declared_kinds` refuses."""
    declared_kinds(source.config, source.num_layers, f"{folder}/config.json")
