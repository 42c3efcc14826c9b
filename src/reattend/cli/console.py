"""What commands print: progress on standard error, one report on standard output."""

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from reattend.cli.report import aligned, human, table
from reattend.cli.streams import put, tell
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
    clock = _Clock()
    with bars.Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, bars.TaskID] = {}

        def report(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total, amount="")
            elapsed, again = clock.elapsed(phase, done)
            if again:
                bar.reset(tasks[phase])
            amount = _amount(phase, done, total, elapsed)
            bar.update(tasks[phase], completed=done, total=total, amount=amount)

        yield report


def _lines() -> Progress:
    clock = _Clock()
    told: dict[str, int] = {}

    def report(phase: str, done: int, total: int) -> None:
        elapsed, again = clock.elapsed(phase, done)
        tenth = 10 * done // max(total, 1)
        if tenth != (0 if again else told.get(phase, 0)):
            tell(f"{phase}: {_amount(phase, done, total, elapsed)}, {elapsed:.1f} s")
        told[phase] = tenth

    return report


class _Clock:
    """Times phases; one that starts again, as each step of a recipe does, is timed anew."""

    def __init__(self) -> None:
        self._started: dict[str, float] = {}
        self._done: dict[str, int] = {}

    def elapsed(self, phase: str, done: int) -> tuple[float, bool]:
        """Return the seconds since a phase began, and whether it just began again."""
        again = done < self._done.get(phase, 0)
        if again or phase not in self._started:
            self._started[phase] = time.monotonic()
        self._done[phase] = done
        return time.monotonic() - self._started[phase], again


def _amount(phase: str, done: int, total: int, elapsed: float) -> str:
    """What is done of the total, in bytes with their rate, or counted."""
    if phase not in BYTE_PHASES:
        return f"{done} of {total}"
    rate = f", {human(done / elapsed)}/s" if elapsed > 0 else ""
    return f"{human(done)} of {human(total)}{rate}"


def show(report: dict[str, Any], *, as_json: bool) -> None:
    """Print a report: as JSON, as a table on a terminal, as aligned lines elsewhere."""
    if as_json:
        put(json.dumps(_numbers(report), indent=2, allow_nan=False))
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(table(report))
    else:
        put("\n".join(aligned(report)))


def _numbers(value: Any) -> Any:
    """Return a report with null for what is no number: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_numbers(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
