"""What commands print: progress on standard error, one report on standard output."""

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from reattend import processes
from reattend.cli.streams import put, tell
from reattend.progress import Progress, silent
from reattend.reporting.readable import aligned, human, table

BYTE_PHASES = ("rewriting", "pushing")
TOKEN_PHASES = ("healing",)


@contextmanager
def progress() -> Iterator[Progress]:
    """A bar per phase with rate and time left on a terminal, a plain line per tenth elsewhere.

    Of several processes only the first one tells.
    """
    if processes.rank():
        yield silent
    elif sys.stderr.isatty():
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

        def report(phase: str, done: int, total: int, note: str = "") -> None:
            lap = clock.lap(phase, done)
            amount = _amount(phase, done, total, lap) + (f", {note}" if note else "")
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total, completed=done, amount=amount)
            elif lap.fresh:
                bar.reset(tasks[phase], total=total, completed=done, amount=amount)
            else:
                bar.update(tasks[phase], completed=done, amount=amount)

        yield report


def _lines() -> Progress:
    clock = _Clock()
    told: dict[str, int] = {}

    def report(phase: str, done: int, total: int, note: str = "") -> None:
        lap = clock.lap(phase, done)
        tenth = 10 * done // max(total, 1)
        if tenth != (0 if lap.fresh else told[phase]):
            noted = f", {note}" if note else ""
            tell(f"{phase}: {_amount(phase, done, total, lap)}{noted}, {lap.seconds:.1f} s")
        told[phase] = tenth

    return report


class _Lap(NamedTuple):
    """A phase so far: what was done in this run, in how many seconds, and whether it has only just begun."""

    done: int
    seconds: float
    fresh: bool


class _Clock:
    """Times phases; one that starts again, as each step of a recipe does, is timed anew."""

    def __init__(self) -> None:
        self._started: dict[str, tuple[float, int]] = {}
        self._done: dict[str, int] = {}

    def lap(self, phase: str, done: int) -> _Lap:
        """Return the lap since a phase began; what it began with was done by an earlier run."""
        fresh = phase not in self._started or done < self._done[phase]
        if fresh:
            self._started[phase] = time.monotonic(), done
        self._done[phase] = done
        started, before = self._started[phase]
        return _Lap(done - before, time.monotonic() - started, fresh)


def _amount(phase: str, done: int, total: int, lap: _Lap) -> str:
    """What is done of the total, in bytes or tokens with the rate of this run, or counted."""
    if phase in TOKEN_PHASES:
        speed = f", {lap.done / lap.seconds:.0f} tokens/s" if lap.done and lap.seconds > 0 else ""
        return f"{done} of {total} tokens{speed}"
    if phase not in BYTE_PHASES:
        return f"{done} of {total}"
    rate = f", {human(lap.done / lap.seconds)}/s" if lap.done and lap.seconds > 0 else ""
    return f"{human(done)} of {human(total)}{rate}"


def show(report: dict[str, Any], *, as_json: bool) -> None:
    """Print a report, the first process alone: as JSON, as a table on a terminal, as aligned lines elsewhere."""
    if processes.rank():
        return
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
