"""apply(): run a plan in streamed passes; the output appears whole or not at all."""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import reattend
from reattend import processes
from reattend.checkpoint.files import HubRepository, LocalFolder, open_files
from reattend.checkpoint.index import INDEX, MANIFEST, RECIPE, fingerprint, open_checkpoint
from reattend.checkpoint.staging import Staging
from reattend.errors import DeadEndError, Failure, ReattendError, Refusal, first_line
from reattend.families.source import source_of
from reattend.modeling.loading import check_device
from reattend.pipeline.calibrating import Calibration, earlier_texts, prepare
from reattend.pipeline.history import earlier_base, earlier_runs
from reattend.pipeline.passes import Pass, passes_of
from reattend.pipeline.planning import Plan, plan, settle
from reattend.pipeline.streaming import stream
from reattend.progress import Progress, silent
from reattend.recipes.schema import Recipe, dump_recipe
from reattend.transform import Statistics


@dataclass(frozen=True)
class _Run:
    """A plan under way."""

    plan: Plan
    calibration: Calibration
    progress: Progress
    base: dict[str, str] | None

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What an output says about how it came to be."""
        return {
            "reattend": reattend.__version__,
            "recipe": self.plan.recipe.model_dump(mode="json"),
            "source": fingerprint(self.plan.checkpoint),
            "base": self.base,
            "earlier": earlier_runs(self.plan.checkpoint),
            "texts": earlier_texts(self.plan.checkpoint) | self.calibration.records(),
            "tolerance": self.plan.tolerance,
        }

    def key(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed; times of change catch files edited meanwhile."""
        folder, checkpoint = Path(self.plan.checkpoint.files.name), self.plan.checkpoint
        times = {f: (folder / f).stat().st_mtime_ns for f in sorted([*checkpoint.digests, *checkpoint.sidecars])}
        headers = [hashlib.sha256(h).hexdigest() for s in self.plan.stages for h in s.layout.headers.values()]
        return {**self.manifest, "times": times, "headers": headers, "device": self.calibration.device}


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
    """Write `model` rewritten by `recipe` to the folder `out`; return the plan that was run, with what it decided.

    Calibration runs on `device`. `progress` is told source bytes ("rewriting") and layers ("calibrating").
    Raises `Refusal` before anything is written, or, for NaN and inf in the weights and for a budget that
    nothing meets, after removing what was;
    `Failure` for what goes wrong on the way: then what was finished is kept for `resume`. The same inputs on the
    same kind of device give the same bytes, interrupted or not.
    """
    check_device(device)
    processes.check_device(device)
    files = open_files(model)
    if not isinstance(files, LocalFolder):
        plan(recipe, model)  # what can't be done is refused before a Hub repository is downloaded
    planned = plan(recipe, files.download())
    run = _Run(planned, prepare(planned, device, progress), progress, _base(files, planned))
    target = _target(planned, Path(out))
    if processes.rank():
        processes.join(device)
        run.calibration.follow()
        return planned
    with Staging(target, run.key(), resume=resume, overwrite=overwrite) as staging:
        processes.join(device)
        _run_or_clear(run, staging)
    processes.agree(None)
    return settle(planned, read_findings(target))


def _base(files: LocalFolder | HubRepository, planned: Plan) -> dict[str, str] | None:
    """Return the model on the Hub that the output goes back to, and its commit, where one is known."""
    if isinstance(files, HubRepository):
        return {"model": files.repository, "revision": files.commit}
    return earlier_base(planned.checkpoint)


def _run_or_clear(run: _Run, staging: Staging) -> None:
    """Run; on a failure keep what a resumed run could use, and nothing else."""
    try:
        if not staging.finished:
            _check_space(run.plan, staging)
            _run_passes(run, staging)
        staging.commit()
    except DeadEndError:
        staging.discard()
        raise
    except OSError as error:
        kept = f"what was written is kept in {staging.folder} for --resume"
        raise Failure(f"{staging.out}: {error.strerror or error}; {kept}") from error
    except Exception as error:
        if not staging.holds_work:
            staging.discard()
        if staging.resumed and not isinstance(error, ReattendError):
            what = f"{type(error).__name__}: {first_line(error)}"
            raise Failure(f"{staging.folder}: can't be gone on with ({what}); use --overwrite") from error
        raise


def _target(planned: Plan, out: Path) -> Path:
    """Return where the output goes, links followed. Raises `Refusal` for a place that can't take it."""
    inside = Path(planned.checkpoint.files.name).resolve()
    target = Path(os.path.realpath(out))
    try:
        if target.is_symlink():
            raise Refusal(f"{out}: is a link that leads nowhere")
        if target == inside or inside in target.parents:
            raise Refusal(f"{out}: lies inside the input {inside}")
        if target in inside.parents:
            raise Refusal(f"{out}: contains the input {inside}")
        if target.exists() and not target.is_dir():
            raise Refusal(f"{out}: is a file")
        if not target.parent.is_dir():
            raise Refusal(f"{target.parent}: no such folder")
        if target.is_mount():
            raise Refusal(f"{out}: is a mount point, which an output can't be renamed to; name a folder in it")
    except OSError as error:
        raise Refusal(f"{out}: can't be written to ({error.strerror})") from error
    return target


def _check_space(planned: Plan, staging: Staging) -> None:
    present = sum(f.stat().st_blocks * 512 for f in staging.folder.rglob("*") if f.is_file())
    free = shutil.disk_usage(staging.folder).free
    if planned.disk_bytes > free + present:
        raise Refusal(f"{staging.out}: needs {planned.disk_bytes} bytes, {free} are free")


def _run_passes(run: _Run, staging: Staging) -> None:
    """Make every pass; all but the last leave an intermediate model in the work folder until the next is there."""
    folder = Path(run.plan.checkpoint.files.name)
    *earlier, last = run.plan.passes
    made = [staging.work / f"model-{number}" for number in range(1, len(earlier) + 1)]
    done = max((number for number, model in enumerate(made, 1) if model.exists()), default=0)
    for number, steps in enumerate(earlier, 1):
        if number > done:
            with Staging(made[number - 1], {"stage": number}, resume=True, overwrite=False) as inner:
                _run_pass(run, steps, folder, inner)
                inner.commit()
        if number > 1 and folder.exists():
            aside = folder.with_name(f"{folder.name}.done")  # a half-removed model must not look like one
            folder.rename(aside)
            shutil.rmtree(aside)
        folder = made[number - 1]
    _run_pass(run, last, folder, staging)


def _run_pass(run: _Run, steps: Pass, folder: Path, staging: Staging) -> None:
    first = steps.stages[0].step is run.plan.stages[0].step
    checkpoint = run.plan.checkpoint if first else open_checkpoint(folder)
    source = steps.source if first else source_of(checkpoint)
    found = [] if first else read_findings(folder)  # one for each step before
    calibrated = replace(steps.stages[0], source=source)
    statistics = run.calibration.statistics(calibrated, folder, staging)
    steps = _decided(run.plan, steps, found, statistics).bound(source, statistics)
    stream(steps, checkpoint, statistics, staging, run.progress)
    for file in checkpoint.sidecars:
        staging.copy_file(Path(checkpoint.files.name) / file, file)
    for file, content in steps.side_files(statistics):
        staging.add_file(file, content)
    staging.add_file(RECIPE, dump_recipe(run.plan.recipe).encode())
    told = {"engines": steps.stages[-1].engines, "findings": found + steps.findings(statistics)}
    staging.add_file(MANIFEST, _json(run.manifest | told))
    _declare(steps, steps.config(statistics), staging)


def _decided(planned: Plan, steps: Pass, found: list[dict[str, Any]], statistics: Statistics) -> Pass:
    """Return the pass as its own calibration, or that of a step before, decided it: `found` is what those found."""
    first = steps.stages[0].transform
    own = [first.findings(statistics)] if first.undecided else []
    settled = settle(planned, [*found, *own])
    return steps if settled is planned else passes_of(settled.stages[len(found) :])[0]


def _declare(steps: Pass, config: dict[str, Any], staging: Staging) -> None:
    """Write last what makes the folder a checkpoint."""
    index = steps.layout.index()
    if index is not None:
        staging.add_file(INDEX, index)
    staging.add_file("config.json", _json(config))


def read_findings(out: Path) -> list[dict[str, Any]]:
    """Return what each step of the run that wrote `out` measured and chose."""
    findings: list[dict[str, Any]] = json.loads((out / MANIFEST).read_text("utf-8"))["findings"]
    return findings


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
