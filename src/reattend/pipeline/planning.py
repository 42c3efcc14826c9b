"""plan(): what a recipe would do to a checkpoint, from headers and config alone."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pydantic import BaseModel

from reattend.checkpoint.header import BITS, TensorSpec
from reattend.checkpoint.index import RECIPE, Checkpoint, open_checkpoint
from reattend.checkpoint.staging import Layout, lay_out
from reattend.errors import Refusal
from reattend.families.attention_kinds import check_kinds
from reattend.families.source import Source, describe, source_of
from reattend.modeling.int8_outliers import check_outliers
from reattend.pipeline.memory import PROCESS_BYTES, calibration_bytes
from reattend.pipeline.passes import Pass, passes_of
from reattend.pipeline.stage import Stage
from reattend.recipes.schema import Recipe, load_recipe
from reattend.recipes.table import ANY_LAYERS, ANY_SHAPES, COLLECTIVE
from reattend.transform import Group, Transform


@dataclass(frozen=True)
class Plan:
    """A recipe bound to a checkpoint: one stage per step, each reading what the one before wrote."""

    checkpoint: Checkpoint
    recipe: Recipe
    stages: tuple[Stage, ...]
    remarks: tuple[str, ...]

    @property
    def source(self) -> Source:
        """The model as it is."""
        return self.stages[0].source

    @property
    def result(self) -> Source:
        """The model as it will be."""
        return self.stages[-1].result

    @property
    def layout(self) -> Layout:
        """Where the output's tensors go."""
        return self.stages[-1].layout

    @cached_property
    def passes(self) -> tuple[Pass, ...]:
        """The passes over the weights that the steps take."""
        return passes_of(self.stages)

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts that the steps need."""
        return tuple(sorted({text for stage in self.stages for text in stage.transform.texts}))

    @property
    def teachers(self) -> tuple[str, ...]:
        """The other models that steps learn from."""
        named = (getattr(stage.step, "teacher", None) for stage in self.stages)
        return tuple(dict.fromkeys(teacher for teacher in named if teacher is not None))

    @property
    def tolerance(self) -> float:
        """The relative L2 error of logits that `verify` allows, were each step to use its own up: (1 + e) - 1."""
        return math.prod(1 + stage.transform.tolerance for stage in self.stages) - 1

    @property
    def peak_bytes(self) -> int:
        """Estimated peak bytes of the rewrite, calibration apart: the largest group, in and out, plus the process."""
        return PROCESS_BYTES + max(one.group_bytes for one in self.passes)

    @property
    def calibration_bytes(self) -> dict[str, int]:
        """The least peak memory of calibration (see `memory.calibration_bytes`); empty where no step calibrates."""
        found = [_calibration_bytes(self.recipe, stage) for stage in self.stages if stage.transform.texts]
        return {name: max(sizes[name] for sizes in found) for name in (found[0] if found else ())}

    @property
    def disk_bytes(self) -> int:
        """Bytes of the output, sidecars included, of a step's statistics and of the model between two passes."""
        sidecars = sum(self.checkpoint.sizes[f] for f in self.checkpoint.sidecars)
        layouts = [one.layout for one in self.passes]
        sizes = [
            max(layout.nbytes, open_) + sum(map(len, layout.headers.values())) + sidecars
            for layout, open_ in zip(layouts, self._open_bytes(), strict=True)
        ]
        kept = [one.stages[0].transform.statistics_bytes(one.source) for one in self.passes]
        return max(sum(bytes_) for bytes_ in zip(sizes, [0, *sizes], kept, strict=False))

    def _open_bytes(self) -> Iterator[int]:
        """Yield, by pass, what its steps and those before write at most, as far as calibration is to decide it."""
        most = 0
        for one in self.passes:
            most = max([most, *(stage.most_bytes for stage in one.stages if stage.transform.undecided)])
            yield most

    def summary(self) -> dict[str, Any]:
        """Return the plan as plain data, sizes in bytes."""
        return {
            "model": self.checkpoint.files.name,
            "bytes_before": self.checkpoint.nbytes,
            "bytes_after": self.layout.nbytes,
            "ratio": round(self.layout.nbytes / self.checkpoint.nbytes, 4),
            "parameters_before": self.source.parameters,
            "parameters_after": self.result.parameters,
            "cache_bytes_per_token_before": cache_bytes(self.source),
            "cache_bytes_per_token_after": cache_bytes(self.result),
            "peak_memory_bytes": self.peak_bytes,
            "calibration_memory_at_least_bytes": self.calibration_bytes,
            "disk_bytes": self.disk_bytes,
            "shards": len(self.layout.headers),
            "engines": self.stages[-1].engines,
            "remarks": list(self.remarks),
            "passes": [[stage.name for stage in one.stages] for one in self.passes],
            "steps": [stage.summary() for stage in self.stages],
        }


def windows_of(recipe: Recipe, stage: Stage) -> dict[str, int | None]:
    """Return how many windows of each of its texts a step runs on: its own `windows`, if it has such, may be all."""
    counts = {"calibration": getattr(stage.step, "windows", recipe.windows), "selection": recipe.selection_windows}
    return {purpose: counts[purpose] for purpose in stage.transform.texts}


def _calibration_bytes(recipe: Recipe, stage: Stage) -> dict[str, int]:
    if stage.name in COLLECTIVE:  # trains whole models instead of passing over layers
        needed = PROCESS_BYTES + stage.transform.calibration_bytes(stage.source)  # type: ignore[attr-defined]
        return {"weights_held": needed, "weights_offloaded": needed}
    counts = windows_of(recipe, stage).values()
    return calibration_bytes(stage.source, [(count or 0) * recipe.window for count in counts])


def cache_bytes(source: Source) -> int:
    """KV cache bytes per token in the model's own dtype."""
    embedding = source.tensors[f"{source.prefix}{source.family.embedding}.weight"]
    return source.cache_numbers_per_token * max(16, BITS[embedding.dtype]) // 8


def plan(recipe: str | os.PathLike[str] | Recipe, model: str | os.PathLike[str]) -> Plan:
    """Plan `recipe` (a YAML path, a built-in name, or a `Recipe`) on `model` (a folder or a Hub id).

    Reads headers and config only. Raises `Refusal` for anything that `apply` could not do.
    """
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    checkpoint = open_checkpoint(model)
    source = source_of(checkpoint)
    check_outliers(checkpoint, source)
    check_kinds(checkpoint.files.name, source)
    _check_open(loaded)
    stages = _bound(checkpoint, loaded, source, loaded.steps)
    planned = Plan(checkpoint, loaded, stages, _stage_remarks(stages))
    _check_window(planned)
    return replace(planned, remarks=(*planned.remarks, *_remarks(planned)))


def _check_open(recipe: Recipe) -> None:
    """Refuse what may turn out impossible once a step's calibration has decided what it writes, hours later."""
    open_: int | None = None
    for number, step in enumerate(recipe.steps):
        transform: Transform = step  # type: ignore[assignment]
        name = step.step  # type: ignore[attr-defined]
        refused = name not in ANY_SHAPES or (transform.texts and name not in COLLECTIVE)
        if open_ is not None and refused and name not in ANY_LAYERS:
            how = "with calibration " if name in ANY_SHAPES else ""
            raise Refusal(
                f"steps[{number}]: {name} {how}can't follow steps[{open_}], whose calibration decides its output; "
                "put it before, or apply it to this recipe's output in a run of its own"
            )
        open_ = number if transform.undecided else open_


def _bound(
    checkpoint: Checkpoint, recipe: Recipe, source: Source, steps: Sequence[BaseModel], before: tuple[Stage, ...] = ()
) -> tuple[Stage, ...]:
    """Return the stages `before`, and `steps` after them, each bound to what it reads: the first one to `source`."""
    stages = list(before)
    places = before[-1].layout.places if before else _places(checkpoint)
    for number, step in enumerate(steps, len(before)):
        try:
            stages.append(_stage(step, source, places, checkpoint.metadata, recipe.max_shard_bytes))
        except Refusal as refusal:
            if len(recipe.steps) == 1:
                raise
            raise Refusal(f"steps[{number}]: {refusal}") from refusal
        source, places = stages[-1].result, stages[-1].layout.places
    return tuple(stages)


def _check_window(planned: Plan) -> None:
    limit = planned.source.get("max_position_embeddings")
    if planned.texts and limit and planned.recipe.window > limit:
        raise Refusal(
            f"window: {planned.recipe.window} tokens, the model takes {limit}; set it in the recipe, or by --window"
        )


def _remarks(planned: Plan) -> Iterator[str]:
    checkpoint = planned.checkpoint
    if checkpoint.ignored:
        yield f"not copied, as they hold other weights: {', '.join(checkpoint.ignored)}"
    for name, kind in checkpoint.skipped.items():
        yield f"not copied: {name} ({kind})"
    if checkpoint.reported:
        yield f"not copied, as they tell of the source alone: {', '.join(checkpoint.reported)}"
    if RECIPE in checkpoint.sizes:
        yield f"the source's {RECIPE} is replaced by this run's"
    for purpose in ("calibration", "selection"):
        if getattr(planned.recipe, purpose) and purpose not in planned.texts:
            yield f"the {purpose} text is not used: no step needs it"


def settle(planned: Plan, findings: Sequence[Mapping[str, Any]]) -> Plan:
    """Return the plan with what calibration decided, given the findings of its first steps; itself if nothing was."""
    decided = zip(planned.stages, findings, strict=False)
    number = next((n for n, (stage, _) in enumerate(decided) if stage.transform.undecided), None)
    if number is None:
        return planned
    last, *later = planned.stages[number:]
    step: BaseModel = last.transform.settled(findings[number])  # type: ignore[assignment]
    steps = [step, *(stage.step for stage in later)]
    stages = _bound(planned.checkpoint, planned.recipe, last.source, steps, planned.stages[:number])
    general = planned.remarks[sum(len(stage.remarks) for stage in planned.stages) :]
    return replace(planned, stages=stages, remarks=(*_stage_remarks(stages), *general))


def _places(checkpoint: Checkpoint) -> dict[str, tuple[str, int]]:
    return {name: (stored.file, stored.start) for name, stored in checkpoint.tensors.items()}


def _stage_remarks(stages: Iterable[Stage]) -> tuple[str, ...]:
    return tuple(remark for stage in stages for remark in stage.remarks)


def _stage(
    step: BaseModel, source: Source, places: dict[str, tuple[str, int]], metadata: dict[str, str], max_bytes: int
) -> Stage:
    transform: Transform = step  # type: ignore[assignment]
    remarks = check_step(step, source)
    groups = _ordered(source, list(transform.groups(source)), places)
    written = [spec for group in groups for spec in group.writes]
    _check_distinct(written, places)
    layout = lay_out(written, {"format": "pt"} | metadata, max_bytes)
    result = describe(transform.edit_config(source, {}), {spec.name: spec for spec in written})
    return Stage(step, source, result, groups, layout, tuple(remarks))


def check_step(step: BaseModel, source: Source) -> list[str]:
    """Return a step's remarks on a source. Raises `Refusal` where it can't apply, or can't be calibrated."""
    transform: Transform = step  # type: ignore[assignment]
    name = step.step  # type: ignore[attr-defined]
    if transform.texts and name not in (*COLLECTIVE, *ANY_LAYERS) and source.family.not_by_itself:
        raise Refusal(f"{name}: the source's {source.family.not_by_itself}; calibrate before that step")
    return transform.check(source)


def _ordered(source: Source, groups: list[Group], places: dict[str, tuple[str, int]]) -> tuple[Group, ...]:
    """Add the kept tensors as groups of their own; order all by where they lie, for sequential reads."""
    taken = {name for group in groups for name in group.reads}
    kept = (spec for name, spec in source.tensors.items() if name not in taken)
    every = groups + [Group((spec.name,), (spec,)) for spec in kept]
    return tuple(sorted(every, key=lambda group: min(places[name] for name in group.reads)))


def _check_distinct(written: list[TensorSpec], places: dict[str, tuple[str, int]]) -> None:
    seen: set[str] = set()
    for spec in written:
        if spec.name in seen:
            where = f"{places[spec.name][0]}: " if spec.name in places else ""
            raise Refusal(f"{where}tensor {spec.name!r} exists in the source already, and the step writes one")
        seen.add(spec.name)
