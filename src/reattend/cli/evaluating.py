"""The command `eval`: perplexity on a text, or tasks of lm-evaluation-harness."""

from typing import Any

import click

from reattend.cli.console import progress, show
from reattend.cli.recipes import as_json
from reattend.errors import Refusal
from reattend.modeling.dtypes import DTYPES

_OF_TEXTS = ("window", "windows", "outliers", "static_calibration")  # options that go with --text alone
_OF_TASKS = ("harness_tasks", "limit", "batch_size")


@click.command("eval")
@click.argument("model")
@click.option("--text", metavar="FILE", help="UTF-8 file to measure on, or dataset:PATH.")
@click.option("--against", metavar="BASE", help="A second model, measured on the same tokens.")
@click.option("--window", type=click.IntRange(2), help="Tokens in a window [default: 2048].")
@click.option("--windows", type=click.IntRange(1), help="Windows to measure [default: all].")
@click.option("--dtype", default="auto", show_default=True, help=", ".join(DTYPES))
@click.option("--outliers", is_flag=True, help="Also inf-norms, kurtosis and attention to the first token, by layer.")
@click.option(
    "--static-calibration", metavar="TEXT", help="With --outliers: simulate static W8A8, ranges from this text."
)
@click.option("--harness", metavar="TASKS", help="Instead of a text: tasks of lm-evaluation-harness, by commas.")
@click.option("--harness-tasks", metavar="FOLDER", help="With --harness: task files of your own.")
@click.option("--limit", type=click.IntRange(1), help="With --harness: documents of each task [default: all].")
@click.option("--batch-size", type=click.IntRange(1), help="With --harness: requests at a time [default: 1].")
@click.option("--device", default="cpu", show_default=True, help="Where models run: cpu, cuda:0.")
@as_json
def evaluate(model: str, text: str | None, harness: str | None, as_json: bool, **options: Any) -> None:
    """Measure perplexity with its error, against BASE also KL divergence and top-1 agreement; or run tasks."""
    if (text is None) == (harness is None):
        raise Refusal("eval: expects --text FILE, or --harness TASKS")
    for name in _OF_TEXTS if text is None else _OF_TASKS:
        if options.pop(name):
            flag = f"--{name.replace('_', '-')}"
            raise Refusal(f"{flag}: goes with {'--text' if text is None else '--harness'} alone")
    given = {name: value for name, value in options.items() if value is not None}
    found = _perplexity(model, text, given) if text is not None else _tasks(model, harness or "", given)
    show(found, as_json=as_json)


def _perplexity(model: str, text: str, options: dict[str, Any]) -> dict[str, Any]:
    import reattend

    with progress() as told:
        return reattend.evaluate(model, text, progress=told, **options)


def _tasks(model: str, harness: str, options: dict[str, Any]) -> dict[str, Any]:
    from reattend.evaluation.harness import evaluate_tasks

    folder = options.pop("harness_tasks", None)
    return evaluate_tasks(model, [task.strip() for task in harness.split(",")], tasks_folder=folder, **options)
