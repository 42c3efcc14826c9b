"""What commands print: progress on standard error, one report on standard output."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import click

from reattend.cli.report import aligned, table


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
    """Print a report: as JSON, as a table on a terminal, as aligned lines elsewhere."""
    if as_json:
        click.echo(json.dumps(report, indent=2))
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(table(report))
    else:
        click.echo("\n".join(aligned(report)))
