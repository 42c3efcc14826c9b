"""What commands print: progress on standard error, one report on standard output."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import click


class Report(Protocol):
    """Called with (done, total)."""

    def __call__(self, done: int, total: int) -> None:
        """Tell how far the work is."""


@contextmanager
def progress(label: str, *, nbytes: bool) -> Iterator[Report]:
    """A bar with rate and time left on a terminal, a plain line per tenth elsewhere."""
    if sys.stderr.isatty():
        with _bar(label, nbytes) as report:
            yield report
    else:
        yield _lines(label)


@contextmanager
def _bar(label: str, nbytes: bool) -> Iterator[Report]:
    from rich import progress as bars
    from rich.console import Console

    units = [bars.DownloadColumn(), bars.TransferSpeedColumn()] if nbytes else [bars.MofNCompleteColumn()]
    columns = [
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        *units,
        bars.TimeRemainingColumn(),
    ]
    with bars.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines(label: str) -> Report:
    start, told = time.monotonic(), 0

    def report(done: int, total: int) -> None:
        nonlocal told
        tenth = 10 * done // max(total, 1)
        if tenth > told:
            told = tenth
            click.echo(f"{label}: {10 * tenth} %, {time.monotonic() - start:.1f} s", err=True)

    return report


def show(report: dict[str, Any], *, as_json: bool) -> None:
    """Print a report as JSON, or as aligned lines."""
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    width = max(map(len, report))
    for key, value in report.items():
        for number, line in enumerate(_text(value)):
            click.echo(f"{key if not number else '':<{width}}  {line}")


def _text(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [f"{key}: {item}" for key, item in value.items()] or ["-"]
    if isinstance(value, (list, tuple)):
        return [str(item) for item in value] or ["-"]
    if isinstance(value, float):
        return [f"{value:.5g}"]
    if isinstance(value, int) and not isinstance(value, bool):
        return [f"{value:,}".replace(",", " ")]
    return ["not measured" if value is None else str(value)]
