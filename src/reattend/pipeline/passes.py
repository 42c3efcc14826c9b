"""Steps that are taken in one pass over the weights: what one writes, the next reads from memory.

A step that calibrates has to see the model before it, so it begins a pass; those without calibration join one.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch import Tensor

from reattend.checkpoint.staging import Layout
from reattend.families.source import Source, describe
from reattend.pipeline.stage import Stage
from reattend.transform import Group, Statistics


@dataclass(frozen=True)
class Pass:
    """One step or several, and the groups that they rewrite together, in the order of work.

    `members` holds, by a group's key, each step's own groups in it. Groups without a key are kept tensors.
    """

    stages: tuple[Stage, ...]
    groups: tuple[Group, ...]
    members: Mapping[str, tuple[tuple[Group, ...], ...]]

    @property
    def source(self) -> Source:
        """The model that is read."""
        return self.stages[0].source

    @property
    def layout(self) -> Layout:
        """Where the tensors written go."""
        return self.stages[-1].layout

    @property
    def group_bytes(self) -> int:
        """Bytes of the largest group: in, between the steps and out, fp32 copies, and a layer's statistics."""
        first = self.stages[0]
        statistics = first.transform.statistics_bytes(first.source) // first.source.num_layers
        return max((self._bytes(key) for key in self.members), default=0) + statistics

    def _bytes(self, key: str) -> int:
        reads = [self.source.tensors[name] for group in self.members[key][0] for name in group.reads]
        written = [spec for groups in self.members[key] for group in groups for spec in group.writes]
        return sum(spec.nbytes for spec in [*reads, *written]) + 8 * max(spec.numel for spec in [*reads, *written])

    def bound(self, source: Source, statistics: Statistics) -> "Pass":
        """Return the pass on the model as it is: planned was a config without what steps learn."""
        stages: list[Stage] = []
        for stage in self.stages:
            if stages:
                before = stages[-1]
                config = before.transform.edit_config(before.source, statistics)
                source = describe(json.loads(json.dumps(config)), before.result.tensors)
                statistics = {}
            stages.append(replace(stage, source=source))
        return replace(self, stages=tuple(stages))

    def rewrite(self, group: Group, tensors: Mapping[str, Tensor], statistics: Statistics) -> dict[str, Tensor]:
        """Return what the steps together make of a group's tensors; `statistics` are the first step's."""
        held = dict(tensors)
        for stage, groups in zip(self.stages, self.members[group.key], strict=True):
            written: dict[str, Tensor] = {}
            for one in groups:
                read = {name: held.pop(name) for name in one.reads}
                written |= read if stage.is_copy(one) else stage.transform.apply(one, read, statistics, stage.source)
            held, statistics = written, {}
        return held

    def config(self, statistics: Statistics) -> dict[str, Any]:
        """Return the config of the result."""
        last = self.stages[-1]
        return last.transform.edit_config(last.source, self._of(last, statistics))

    def side_files(self, statistics: Statistics) -> Iterator[tuple[str, bytes]]:
        """Yield (path, content) of files beside the weights; a later step's stands in the place of an earlier's."""
        for stage in self.stages:
            yield from stage.transform.side_files(stage.source, self._of(stage, statistics))

    def findings(self, statistics: Statistics) -> list[dict[str, Any]]:
        """Return what each step measured and chose."""
        return [stage.transform.findings(self._of(stage, statistics)) for stage in self.stages]

    def _of(self, stage: Stage, statistics: Statistics) -> Statistics:
        return statistics if stage is self.stages[0] else {}


def passes_of(stages: Iterable[Stage]) -> tuple[Pass, ...]:
    """Divide a recipe's steps into passes."""
    runs: list[list[Stage]] = []
    for stage in stages:
        if runs and not stage.transform.texts:
            runs[-1].append(stage)
        else:
            runs.append([stage])
    return tuple(_joined(run) for run in runs)


def _joined(stages: Sequence[Stage]) -> Pass:
    """Join the steps' groups: those that a tensor goes through belong together."""
    groups: list[Group] = []
    members: dict[str, tuple[tuple[Group, ...], ...]] = {}
    for number, chain in enumerate(_chains(stages)):
        kept = all(stage.is_copy(one) for stage, level in zip(stages, chain, strict=True) for one in level)
        reads = tuple(name for one in chain[0] for name in one.reads)
        writes = tuple(spec for one in chain[-1] for spec in one.writes)
        groups.append(Group(reads, writes, key="" if kept else f"{number}"))
        if not kept:
            members[f"{number}"] = chain
    return Pass(tuple(stages), tuple(groups), members)


def _chains(stages: Sequence[Stage]) -> Iterator[tuple[tuple[Group, ...], ...]]:
    """Yield, per connected component, each step's groups in the order of its own work."""
    nodes = [(level, number) for level, stage in enumerate(stages) for number in range(len(stage.groups))]
    leader = {node: node for node in nodes}

    def find(node: tuple[int, int]) -> tuple[int, int]:
        while leader[node] != node:
            leader[node] = node = leader[leader[node]]
        return node

    for level, (before, after) in enumerate(pairwise(stages)):
        writer = {spec.name: number for number, group in enumerate(before.groups) for spec in group.writes}
        for number, group in enumerate(after.groups):
            for name in group.reads:
                ends = sorted((find((level, writer[name])), find((level + 1, number))))
                leader[ends[1]] = ends[0]
    together: dict[tuple[int, int], list[list[Group]]] = {}
    for level, number in nodes:
        chain = together.setdefault(find((level, number)), [[] for _ in stages])
        chain[level].append(stages[level].groups[number])
    for chain in together.values():
        yield tuple(map(tuple, chain))
