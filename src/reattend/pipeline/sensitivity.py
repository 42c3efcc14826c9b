"""sensitivity(): what a step with something left open would decide, measured; nothing is written."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from reattend.checkpoint.files import open_files
from reattend.errors import Refusal
from reattend.modeling.loading import check_device
from reattend.pipeline.calibrating import StoredStatistics, prepare
from reattend.pipeline.planning import plan, settle
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
    `bytes_before`, `bytes_after` (bytes). Raises `Refusal` for another recipe, and as `apply` does.
    """
    check_device(device)
    planned = plan(recipe, open_files(model).download())
    if len(planned.stages) != 1 or not planned.stages[0].transform.undecided:
        raise Refusal("sensitivity: expects a recipe of one step that leaves something open, as int8 with keep: auto")
    stage, folder = planned.stages[0], Path(planned.checkpoint.files.name)
    calibration = prepare(planned, device, progress)
    with TemporaryDirectory() as scratch:
        statistics = StoredStatistics(Path(scratch))
        stage.transform.calibrate(stage.source, calibration.passes(stage, folder), statistics)
        findings = stage.transform.findings(statistics)
    sizes = {"bytes_before": planned.checkpoint.nbytes, "bytes_after": settle(planned, findings).layout.nbytes}
    return {"model": str(model), **sizes, **findings}
