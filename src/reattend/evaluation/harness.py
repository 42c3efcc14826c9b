"""Tasks of lm-evaluation-harness on a model that `load` runs: on our kernels where an output has such."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reattend import processes
from reattend.checkpoint.files import open_files
from reattend.checkpoint.index import open_checkpoint
from reattend.errors import Failure, Refusal, first_line
from reattend.families.source import source_of
from reattend.modeling.loading import check_device, check_dtype, load

_SEED = 1234  # of few-shot examples and the bootstrap: the harness's own


def evaluate_tasks(
    model: str | os.PathLike[str],
    tasks: Sequence[str],
    *,
    tasks_folder: str | os.PathLike[str] | None = None,
    against: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    dtype: str = "auto",
    device: str = "cpu",
) -> dict[str, Any]:
    """Run `tasks` of lm-evaluation-harness on `model`, and on `against`, with the harness's own prompts and metrics.

    `tasks_folder` holds task files of one's own; with them and local data nothing is downloaded. `limit` is a number
    of documents per task. Returns `tasks`: by name, its metrics with standard errors, version, shots and documents;
    and `base_tasks` of `against`. Raises `Refusal` for an unknown task, an encoder, and if lm-eval is not installed.
    """
    if processes.count() > 1:
        raise Refusal("harness: tasks are run by a single process; run it without torchrun")
    check_dtype(dtype)
    check_device(device)
    if limit is not None and limit < 1:
        raise Refusal(f"limit: {limit}, expected 1 or more")
    named = [path for path in (model, against) if path is not None]
    for path in named:
        _check(path)
    manager = _task_manager(tasks_folder)
    _check_tasks(tasks, manager)
    options = {"tasks": list(tasks), "task_manager": manager, "limit": limit}
    found = [_run(path, options, batch_size=batch_size, dtype=dtype, device=device) for path in named]
    report: dict[str, Any] = {"model": str(model), "limit": limit, "batch_size": batch_size, "dtype": dtype}
    return report | dict(zip(("tasks", "base_tasks"), found, strict=False))


def _check(model: str | os.PathLike[str]) -> None:
    family = source_of(open_checkpoint(model)).family
    if "encoder" in family.features:
        raise Refusal(f"{model}: {family.model_type} is an encoder, and the harness asks models what comes next")


def _task_manager(folder: str | os.PathLike[str] | None) -> Any:
    if folder is not None and not Path(folder).is_dir():
        raise Refusal(f"{folder}: no such folder of tasks")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise Refusal("harness: lm-eval is not installed: pip install 'reattend[eval]'") from error
    return TaskManager(include_path=None if folder is None else str(folder))


def _check_tasks(tasks: Sequence[str], manager: Any) -> None:
    for task in tasks:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, 3, 0.0)
            raise Refusal(
                f"harness: no task {task!r}; near are {', '.join(near)}; your own need --harness-tasks FOLDER"
            )


def _run(model: str | os.PathLike[str], options: dict[str, Any], *, batch_size: int, **how: Any) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    loaded = load(open_files(model).download(), simulate=True, **how)
    if loaded.tokenizer is None:
        raise Refusal(f"{model}: has no tokenizer, and tasks need one")
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    try:
        subject = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, backend="causal", batch_size=batch_size)
        result = simple_evaluate(subject, log_samples=False, **options, **dict.fromkeys(seeds, _SEED))
    except Exception as error:  # tasks are foreign code, and may want the network
        raise Failure(f"{model}: the harness failed: {type(error).__name__}: {first_line(error)}") from error
    return {task: _figures(task, result) for task in result["results"]}


def _figures(task: str, result: Any) -> dict[str, Any]:
    """Return a task's metrics by name, filters named where there are several, and what they were measured on."""
    found = {}
    for key, value in result["results"][task].items():
        name, comma, chosen = key.partition(",")
        if comma and isinstance(value, (int, float)):
            found[name if chosen == "none" else f"{name} ({chosen})"] = value
    about = {"version": result["versions"], "shots": result["n-shot"]}
    found |= {name: values[task] for name, values in about.items() if task in values}
    return found | {"documents": result["n-samples"].get(task, {}).get("effective")}
