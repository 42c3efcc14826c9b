"""apply(): the rewrite, and the report that its recipe asks for."""

import os
from typing import Any

from reattend.errors import Failure, ReattendError
from reattend.evaluation.perplexity import check_measurable
from reattend.pipeline import execution
from reattend.pipeline.planning import Plan
from reattend.progress import Progress, silent
from reattend.recipes.schema import Recipe, load_recipe
from reattend.reporting.measure import report
from reattend.texts.reading import check_separate, read_text


def apply(
    recipe: str | os.PathLike[str] | Recipe,
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    device: str = "cpu",
    progress: Progress = silent,
    **run: bool,
) -> Plan:
    """Write `model` rewritten by `recipe` to the folder `out`; with `evaluate` in the recipe also its report.

    See `pipeline.execution.apply` and `report`. What can't be measured is refused before anything is written; where
    measuring fails, the output stays, and `report` can be run again.
    """
    asked = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if asked.evaluate is not None:
        _check(asked, model)
    planned = execution.apply(asked, model, out, device=device, progress=progress, **run)
    if asked.evaluate is not None:
        _report(asked, model, out, device=device, progress=progress)
    return planned


def _check(recipe: Recipe, model: str | os.PathLike[str]) -> None:
    """Refuse what the report could not measure once the work is done."""
    assert recipe.evaluate is not None
    named = {"calibration": recipe.calibration, "selection": recipe.selection, "evaluate": recipe.evaluate.text}
    check_separate({purpose: read_text(text) for purpose, text in named.items() if text})
    asked = recipe.evaluate
    check_measurable(model, window=_window(recipe), dtype=asked.dtype, outliers=asked.outliers)


def _window(recipe: Recipe) -> int:
    assert recipe.evaluate is not None
    return recipe.evaluate.window or recipe.window


def _report(recipe: Recipe, model: Any, out: Any, **run: Any) -> None:
    assert recipe.evaluate is not None
    try:
        report(out, against=model, **recipe.evaluate.model_dump() | {"window": _window(recipe)}, **run)
    except ReattendError as error:
        again = f"reattend report {out} --against {model} --text {recipe.evaluate.text}"
        raise Failure(f"{error}; {out} is written, and has no report: {again}") from error
