"""What commands print: progress on standard error, one report on standard output."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from reattend.cli.report import aligned, human, table
from reattend.progress import Progress

BYTE_PHASES = ("rewriting",)


@contextmanager
def progress() -> Iterator[Progress]:
    """A bar per phase with rate and time left on a terminal, a plain line per tenth elsewhere."""
    if sys.stderr.isatty():
        with _bars() as report:
            yield report
    else:
        yield _lines()


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.TextColumn("{task.fields[amount]}"),
        bars.TimeRemainingColumn(),
    )
    started: dict[str, float] = {}
    with bars.Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, bars.TaskID] = {}

        def report(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                started[phase] = time.monotonic()
                tasks[phase] = bar.add_task(phase, total=total, amount="")
            amount = _amount(phase, done, total, time.monotonic() - started[phase])
            bar.update(tasks[phase], completed=done, total=total, amount=amount)

        yield report


def _lines() -> Progress:
    started: dict[str, float] = {}
    told: dict[str, int] = {}

    def report(phase: str, done: int, total: int) -> None:
        elapsed = time.monotonic() - started.setdefault(phase, time.monotonic())
        tenth = 10 * done // max(total, 1)
        if tenth != told.get(phase, 0):
            told[phase] = tenth
            click.echo(f"{phase}: {_amount(phase, done, total, elapsed)}, {elapsed:.1f} s", err=True)

    return report


def _amount(phase: str, done: int, total: int, elapsed: float) -> str:
    """What is done of the total, in bytes with their rate, or counted."""
    if phase not in BYTE_PHASES:
        return f"{done} of {total}"
    rate = f", {human(done / elapsed)}/s" if elapsed > 0 else ""
    return f"{human(done)} of {human(total)}{rate}"


def show(report: dict[str, Any], *, as_json: bool) -> None:
    """Print a report: as JSON, as a table on a terminal, as aligned lines elsewhere."""
    if as_json:
        click.echo(json.dumps(report, indent=2))
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(table(report))
    else:
        click.echo("\n".join(aligned(report)))
