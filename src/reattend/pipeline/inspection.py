"""inspect(): what a checkpoint is, from headers and config alone, and which steps apply to it."""

import os
from collections import Counter
from typing import Any

from reattend.checkpoint.index import open_checkpoint
from reattend.errors import Refusal
from reattend.families.attention_kinds import declared_kinds
from reattend.families.source import source_of
from reattend.pipeline.planning import cache_bytes, check_step
from reattend.recipes.schema import step_class
from reattend.recipes.table import TRANSFORMS


def inspect(model: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe `model`, a folder or a Hub id; sizes in bytes. Raises `Refusal` for unsound checkpoints."""
    checkpoint = open_checkpoint(model)
    source = source_of(checkpoint)
    specs = source.tensors
    return {
        "model": checkpoint.files.name,
        "family": source.family.model_type,
        "features": sorted(source.family.features),
        "layers": source.num_layers,
        "heads": int(source.get("heads")),
        "kv_heads": source.num_kv_heads,
        "head_dim": source.head_dim,
        "tied_embeddings": source.tied,
        "parameters": source.parameters,
        "bytes": checkpoint.nbytes,
        "cache_bytes_per_token": cache_bytes(source),
        "attention": _attention(checkpoint.files.name, source),
        "dtypes": dict(Counter(spec.dtype for spec in specs.values())),
        "shards": {file: checkpoint.sizes[file] for file in checkpoint.digests},
        "steps": {name: _applies(name, source) for name in TRANSFORMS},
    }


def _attention(folder: str, source: Any) -> dict[str, int] | str:
    """Return how many layers run which attention, where the config says it."""
    kinds = declared_kinds(source.config, source.num_layers, f"{folder}/config.json")
    return "exact" if kinds is None else dict(Counter(kinds))


def _applies(name: str, source: Any) -> str:
    try:
        check_step(step_class(name)(), source)
    except Refusal as refusal:
        return f"no: {refusal}"
    return "yes"
