"""plan(): what a recipe would do to a checkpoint, from headers and config alone."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from reattend.checkpoint.header import BITS, TensorSpec
from reattend.checkpoint.index import Checkpoint, open_checkpoint
from reattend.checkpoint.staging import MAX_SHARD_BYTES, Layout, lay_out
from reattend.errors import Refusal
from reattend.families import Source, source_of
from reattend.recipes.schema import load_recipe
from reattend.transform import Group, Transform

# Resident bytes of a Python process with torch and the copy buffers; scripts/bench/streaming saw 0.33 GB in all.
PROCESS_BYTES = 400_000_000


@dataclass(frozen=True)
class Plan:
    """A recipe bound to a checkpoint. `groups` in the order of work; `layout` places every output tensor."""

    checkpoint: Checkpoint
    source: Source
    result: Source
    steps: tuple[BaseModel, ...]
    transform: Transform
    groups: tuple[Group, ...]
    layout: Layout
    remarks: tuple[str, ...]

    @property
    def peak_bytes(self) -> int:
        """Estimated peak memory in bytes: the largest group, in and out, plus the process."""
        sizes = (self._group_bytes(group) for group in self.groups if not self.is_copy(group))
        return PROCESS_BYTES + max(sizes, default=0)

    def _group_bytes(self, group: Group) -> int:
        reads = sum(self.source.tensors[name].nbytes for name in group.reads)
        return reads + sum(spec.nbytes for spec in group.writes)

    def is_copy(self, group: Group) -> bool:
        """Whether a group is one tensor kept as it is."""
        return len(group.reads) == 1 and group.writes == (self.source.tensors[group.reads[0]],)

    @property
    def disk_bytes(self) -> int:
        """Bytes that the output takes, sidecars included."""
        sidecars = sum(self.checkpoint.sizes[f] for f in self.checkpoint.sidecars)
        return self.layout.nbytes + sum(map(len, self.layout.headers.values())) + sidecars

    def summary(self) -> dict[str, Any]:
        """Return the plan as plain data, sizes in bytes."""
        changed = [group for group in self.groups if not self.is_copy(group)]
        return {
            "model": self.checkpoint.files.name,
            "steps": [step.model_dump(mode="json") for step in self.steps],
            "tensors_rewritten": sum(len(group.reads) for group in changed),
            "tensors_written": sum(len(group.writes) for group in changed),
            "tensors_kept": len(self.groups) - len(changed),
            "bytes_before": self.checkpoint.nbytes,
            "bytes_after": self.layout.nbytes,
            "ratio": round(self.layout.nbytes / self.checkpoint.nbytes, 4),
            "cache_bytes_per_token_before": cache_bytes(self.source),
            "cache_bytes_per_token_after": cache_bytes(self.result),
            "peak_memory_bytes": self.peak_bytes,
            "disk_bytes": self.disk_bytes,
            "shards": len(self.layout.headers),
            "engines": self.transform.engines(self.source),
            "remarks": list(self.remarks),
            "changes": [_change(self.source, group) for group in changed],
        }


def cache_bytes(source: Source) -> int:
    """KV cache bytes per token in the model's own dtype."""
    embedding = source.tensors[f"{source.prefix}{source.family.embedding}.weight"]
    return source.cache_numbers_per_token * max(16, BITS[embedding.dtype]) // 8


def _change(source: Source, group: Group) -> dict[str, Any]:
    def show(spec: TensorSpec) -> dict[str, Any]:
        return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}

    reads = [show(source.tensors[name]) for name in group.reads]
    return {"reads": reads, "writes": [show(spec) for spec in group.writes]}


def plan(
    recipe: str | os.PathLike[str] | Sequence[BaseModel],
    model: str | os.PathLike[str],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Plan:
    """Plan `recipe` (a YAML path, a built-in name, or steps) on `model` (a folder or a Hub id).

    Reads headers and config only. Raises `Refusal` for anything that `apply` could not do.
    """
    steps = load_recipe(recipe) if isinstance(recipe, (str, os.PathLike)) else list(recipe)
    if len(steps) != 1:
        raise Refusal("a recipe of several steps is not supported yet: apply them one after the other")
    checkpoint = open_checkpoint(model)
    source = source_of(checkpoint)
    transform: Transform = steps[0]  # type: ignore[assignment]
    remarks = transform.check(source)
    if checkpoint.ignored:
        remarks.append(f"not copied, as they hold other weights: {', '.join(checkpoint.ignored)}")
    groups = _ordered(checkpoint, list(transform.groups(source)))
    written = [spec for group in groups for spec in group.writes]
    _check_distinct(written)
    layout = lay_out(written, {"format": "pt"} | checkpoint.metadata, max_shard_bytes)
    result = Source(transform.edit_config(source), source.family, {s.name: s for s in written}, source.prefix)
    return Plan(checkpoint, source, result, tuple(steps), transform, groups, layout, tuple(remarks))


def _ordered(checkpoint: Checkpoint, groups: list[Group]) -> tuple[Group, ...]:
    """Add the kept tensors as groups of their own; order all by where they lie, for sequential reads."""
    taken = {name for group in groups for name in group.reads}
    kept = (s.spec for name, s in checkpoint.tensors.items() if name not in taken)
    every = groups + [Group((spec.name,), (spec,)) for spec in kept]

    def place(group: Group) -> tuple[str, int]:
        return min((checkpoint.tensors[n].file, checkpoint.tensors[n].start) for n in group.reads)

    return tuple(sorted(every, key=place))


def _check_distinct(written: list[TensorSpec]) -> None:
    seen: set[str] = set()
    for spec in written:
        if spec.name in seen:
            raise Refusal(f"tensor {spec.name!r} exists in the source already, and the step writes one")
        seen.add(spec.name)
