"""heal(): fine-tuning after surgery, a recipe of the one step `heal`."""

import os
from collections.abc import Mapping
from typing import Any

from reattend.pipeline.execution import apply
from reattend.pipeline.planning import Plan
from reattend.recipes.schema import override, parse_recipe

_RECIPE = ("window", "selection_windows", "seed", "max_shard_bytes")  # settings that a recipe has, not its step


def heal(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    text: str | os.PathLike[str],
    selection: str | os.PathLike[str],
    teacher: str | os.PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    **run: Any,
) -> Plan:
    """Train `model` on `text` (a file or `dataset:..`), towards `teacher`, and write it to the folder `out`.

    `settings` are those of the step `heal` (docs/healing.md), and `window` (tokens), `selection_windows`, `seed` of
    its recipe; `run` takes what `apply` does: device, resume, overwrite, progress. The weights that are best on the
    text `selection` are written; `reattend.json` there says in `findings` how training went. Returns and raises as
    `apply` does.
    """
    given = dict(settings or {})
    shared = {key: given.pop(key) for key in _RECIPE if key in given}
    named = {} if teacher is None else {"teacher": os.fspath(teacher)}
    recipe = parse_recipe({"steps": [{**given, **named, "step": "heal"}]}, "heal")
    texts = {"calibration": os.fspath(text), "selection": os.fspath(selection)}
    return apply(override(recipe, shared | texts), model, out, **run)
