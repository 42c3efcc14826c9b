"""sensitivity(): what a step with something left open would decide, measured; nothing is written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from reattend import processes
from reattend.checkpoint.files import LocalFolder, open_files
from reattend.errors import BadNumbersError, DeadEndError, Refusal
from reattend.modeling.loading import check_device
from reattend.pipeline.calibrating import Calibration, prepare
from reattend.pipeline.planning import Plan, plan, settle
from reattend.pipeline.stored_statistics import StoredStatistics
from reattend.progress import Progress, silent
from reattend.recipes.schema import Recipe


def sensitivity(
    recipe: str | os.PathLike[str] | Recipe,
    model: str | os.PathLike[str],
    *,
    device: str = "cpu",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Calibrate the only step of `recipe`, which leaves something open (as `keep: auto`), on `model`.

    Returns its findings, for `int8`: `sensitivity` (linear -> relative squared error of its layer's output with that
    linear alone in int8; by falling error per weight), `kept`, `selection_perplexity` by number of linears kept; and
    `bytes_before`, `bytes_after` (bytes). Where nothing meets a budget, `refused` says so in the place of `kept` and
    `bytes_after`. Raises `Refusal` for another recipe, and as `apply` does.
    """
    check_device(device)
    processes.check_device(device)
    files = open_files(model)
    planned = plan(recipe, model)  # what can't be done is refused before a Hub repository is downloaded
    if len(planned.stages) != 1 or not planned.stages[0].transform.undecided:
        raise Refusal("sensitivity: expects a recipe of one step that leaves something open, as int8 with keep: auto")
    planned = planned if isinstance(files, LocalFolder) else plan(recipe, files.download())
    calibration = prepare(planned, device, progress)
    processes.join(device)
    findings = _measure(planned, calibration)
    report = {"model": str(model), "remarks": list(planned.remarks), "bytes_before": planned.checkpoint.nbytes}
    if "refused" not in findings:
        report["bytes_after"] = settle(planned, [findings]).layout.nbytes
    return report | findings


def _measure(planned: Plan, calibration: Calibration) -> dict[str, Any]:
    """Run the step's calibration; where it comes to nothing that can be written, what was measured stays true."""
    (stage,), folder = planned.stages, Path(planned.checkpoint.files.name)
    with _shared_folder() as scratch:
        statistics = StoredStatistics(scratch / "statistics")
        refused: dict[str, str] = {}
        try:
            calibration.gather(stage, statistics, folder, scratch / "scratch")
        except BadNumbersError:
            raise
        except DeadEndError as error:
            refused["refused"] = str(error)
        return stage.transform.findings(statistics) | refused


@contextmanager
def _shared_folder() -> Iterator[Path]:
    """Make a temporary folder that all processes use; the first one removes it when none reads any more."""
    if processes.rank():
        yield Path(processes.agree(""))
        processes.meet()
        return
    with TemporaryDirectory() as made:
        yield Path(processes.agree(made))
        processes.meet()
