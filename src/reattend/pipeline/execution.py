"""apply(): run a plan, one streamed pass per step; the output appears whole or not at all."""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reattend
from reattend.checkpoint.files import open_files
from reattend.checkpoint.index import INDEX, Checkpoint, fingerprint, open_checkpoint
from reattend.checkpoint.staging import Staging
from reattend.errors import Failure, Refusal
from reattend.modeling.loading import check_device
from reattend.pipeline.calibrating import Calibration, check_texts
from reattend.pipeline.planning import Plan, Stage, plan
from reattend.pipeline.streaming import stream
from reattend.progress import Progress, silent
from reattend.recipes.schema import Recipe, dump_recipe


@dataclass(frozen=True)
class _Run:
    """A plan under way."""

    plan: Plan
    calibration: Calibration
    progress: Progress

    def manifest(self) -> dict[str, Any]:
        """What an output says about how it came to be."""
        return {
            "reattend": reattend.__version__,
            "recipe": self.plan.recipe.model_dump(mode="json"),
            "source": fingerprint(self.plan.checkpoint),
            "texts": {purpose: text.sha256 for purpose, text in self.calibration.texts.items()},
            "tolerance": self.plan.tolerance,
        }

    def key(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed; times of change catch weights edited meanwhile."""
        folder = Path(self.plan.checkpoint.files.name)
        times = {f: (folder / f).stat().st_mtime_ns for f in sorted(self.plan.checkpoint.digests)}
        headers = [hashlib.sha256(h).hexdigest() for s in self.plan.stages for h in s.layout.headers.values()]
        return {**self.manifest(), "times": times, "headers": headers, "device": self.calibration.device}


def apply(
    recipe: str | os.PathLike[str] | Recipe,
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    device: str = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Plan:
    """Write `model` rewritten by `recipe` to the folder `out`; return the plan that was run.

    Calibration runs on `device`. `progress` is told source bytes ("rewriting") and layers ("calibrating").
    Raises `Refusal` before anything is written, or, for NaN and inf in the weights, after removing what was;
    `Failure` when the disk fails, keeping the part for `resume`. The same inputs on the same kind of device
    give the same bytes, interrupted or not.
    """
    plan(recipe, model)  # what can't be done is refused before a Hub repository is downloaded
    planned = plan(recipe, open_files(model).download())
    texts = check_texts(planned)
    if texts:
        check_device(device)
    run = _Run(planned, Calibration(planned.recipe, texts, device, progress), progress)
    target = Path(os.path.abspath(out))
    _check_place(planned, target)
    with Staging(target, run.key(), resume=resume, overwrite=overwrite) as staging:
        _check_space(planned, staging)
        try:
            _run_stages(run, staging)
            staging.commit()
        except Refusal:
            staging.discard()
            raise
        except OSError as error:
            kept = f"what was written is kept in {staging.folder} for --resume"
            raise Failure(f"{target}: {error.strerror or error}; {kept}") from error
    return planned


def _check_place(planned: Plan, out: Path) -> None:
    inside = Path(planned.checkpoint.files.name).resolve()
    if out.resolve() == inside or inside in out.resolve().parents:
        raise Refusal(f"{out}: lies inside the input {inside}")
    if out.resolve() in inside.parents:
        raise Refusal(f"{out}: contains the input {inside}")
    if out.exists() and not out.is_dir():
        raise Refusal(f"{out}: is a file")
    if not out.parent.is_dir():
        raise Refusal(f"{out.parent}: no such folder")
    if out.is_mount():
        raise Refusal(f"{out}: is a mount point, which a finished output can't be renamed to; name a folder in it")


def _check_space(planned: Plan, staging: Staging) -> None:
    present = sum(f.stat().st_blocks * 512 for f in staging.folder.rglob("*") if f.is_file())
    free = shutil.disk_usage(staging.folder).free
    if planned.disk_bytes > free + present:
        if not staging.done:
            staging.discard()
        raise Refusal(f"{staging.out}: needs {planned.disk_bytes} bytes, {free} are free")


def _run_stages(run: _Run, staging: Staging) -> None:
    """Run every step; all but the last leave an intermediate model in the work folder."""
    folder = Path(run.plan.checkpoint.files.name)
    staging.work.mkdir(exist_ok=True)
    *earlier, last = run.plan.stages
    for number, stage in enumerate(earlier, 1):
        made = staging.work / f"model-{number}"
        if not made.exists():
            with Staging(made, {"stage": number}, resume=True, overwrite=False) as inner:
                _run_stage(run, stage, folder, inner)
                inner.commit()
        if number > 1:
            shutil.rmtree(folder, ignore_errors=True)
        folder = made
    _run_stage(run, last, folder, staging)


def _run_stage(run: _Run, stage: Stage, folder: Path, staging: Staging) -> None:
    checkpoint = run.plan.checkpoint if stage is run.plan.stages[0] else open_checkpoint(folder)
    staging.work.mkdir(exist_ok=True)
    statistics = run.calibration.statistics(stage, folder, staging)
    stream(stage, checkpoint, statistics, staging, run.progress)
    _write_sidecars(run, stage, checkpoint, staging)


def _write_sidecars(run: _Run, stage: Stage, checkpoint: Checkpoint, staging: Staging) -> None:
    """Copy every other file, then write what declares the checkpoint complete."""
    for file in checkpoint.sidecars:
        staging.copy_file(Path(checkpoint.files.name) / file, file)
    staging.add_file("recipe.yaml", dump_recipe(run.plan.recipe).encode())
    staging.add_file("reattend.json", _json(run.manifest()))
    index = stage.layout.index()
    if index is not None:
        staging.add_file(INDEX, index)
    staging.add_file("config.json", _json(dict(stage.result.config)))


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
