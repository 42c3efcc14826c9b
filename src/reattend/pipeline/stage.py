"""One step of a recipe, bound to the model that it reads."""

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from reattend.checkpoint.header import TensorSpec
from reattend.checkpoint.staging import Layout
from reattend.families.portable import engine_limits
from reattend.families.source import Source
from reattend.transform import Group, Transform


@dataclass(frozen=True)
class Stage:
    """One step bound to what it reads. `groups` in the order of work; `layout` places every tensor written."""

    step: BaseModel
    source: Source
    result: Source
    groups: tuple[Group, ...]
    layout: Layout
    remarks: tuple[str, ...]

    @property
    def name(self) -> str:
        """The step's name in a recipe."""
        return str(self.step.step)  # type: ignore[attr-defined]

    @property
    def transform(self) -> Transform:
        """The step as a transform."""
        return self.step  # type: ignore[return-value]

    @property
    def engines(self) -> dict[str, str]:
        """Which engines can serve what the step writes: engine -> "yes", or how, or why not."""
        return self.transform.engines(self.source) | engine_limits(self.result.config)

    @property
    def changed(self) -> list[Group]:
        """The groups that do not just keep a tensor."""
        return [group for group in self.groups if not self.is_copy(group)]

    @property
    def group_bytes(self) -> int:
        """Bytes of the largest group, in and out, two fp32 copies of its largest tensor, and a layer's statistics."""
        statistics = self.transform.statistics_bytes(self.source) // self.source.num_layers
        return max((self._bytes(group) for group in self.changed), default=0) + statistics

    def _bytes(self, group: Group) -> int:
        reads = [self.source.tensors[name] for name in group.reads]
        copies = 8 * max(spec.numel for spec in reads)
        return sum(spec.nbytes for spec in reads) + sum(spec.nbytes for spec in group.writes) + copies

    @property
    def most_bytes(self) -> int:
        """Bytes of the tensors written, at most: what calibration is still to decide may leave all as they are."""
        kept = sum(spec.nbytes for spec in self.source.tensors.values()) if self.transform.undecided else 0
        return max(self.layout.nbytes, kept)

    def is_copy(self, group: Group) -> bool:
        """Whether a group is one tensor kept as it is: one with a key is the step's own."""
        return not group.key and len(group.reads) == 1 and group.writes == (self.source.tensors[group.reads[0]],)

    def summary(self) -> dict[str, Any]:
        """Return the step as plain data, sizes in bytes."""
        return {
            **self.step.model_dump(mode="json"),
            "tensors_rewritten": sum(len(group.reads) for group in self.changed),
            "tensors_written": sum(len(group.writes) for group in self.changed),
            "tensors_kept": len(self.groups) - len(self.changed),
            "bytes_after": self.layout.nbytes,
            "texts": list(self.transform.texts),
            "changes": [_change(self.source, group) for group in self.changed],
        }


def _change(source: Source, group: Group) -> dict[str, Any]:
    def show(spec: TensorSpec) -> dict[str, Any]:
        return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}

    reads = [show(source.tensors[name]) for name in group.reads]
    return {"reads": reads, "writes": [show(spec) for spec in group.writes]}
