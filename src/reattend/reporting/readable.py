"""How a report reads: every value as text, and that as a table or as aligned lines."""

from typing import Any, TypeAlias

Readable: TypeAlias = str | list["Readable"] | dict[str, "Readable"]

_UNITS = ("kB", "MB", "GB", "TB", "PB")


def readable(report: dict[str, Any], *, nbytes: bool = False) -> dict[str, Readable]:
    """Return a report with all of its values as text; with `nbytes` its numbers are sizes and get a unit too."""
    return {key: _value(item, nbytes or _holds_bytes(key, item)) for key, item in report.items()}


def _value(value: Any, nbytes: bool) -> Readable:
    if isinstance(value, dict) and value:
        return readable(value, nbytes=nbytes)
    if isinstance(value, (list, tuple)) and value:
        if all(item is None or isinstance(item, (int, float)) for item in value):
            return ", ".join(_scalar(item, nbytes) for item in value)  # a figure per layer is one line
        return [_value(item, nbytes) for item in value]
    return _scalar(value, nbytes)


def _holds_bytes(key: str, value: Any) -> bool:
    """Sizes are known by their names, and `shards` may map files to theirs."""
    return "bytes" in key.split("_") or (key == "shards" and isinstance(value, dict))


def _scalar(value: Any, nbytes: bool) -> str:
    if isinstance(value, (dict, list, tuple)):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return _grouped(f"{value:,}") + (f" ({human(value)})" if nbytes and value > 999 else "")
    if isinstance(value, float):
        return f"{value:.5g}" if abs(value) < 1e5 else _grouped(f"{value:,.1f}")
    return "not measured" if value is None else str(value)


def _grouped(digits: str) -> str:
    return digits.replace(",", " ")


def human(nbytes: float) -> str:
    """Return bytes in a decimal unit, as 12.3 MB."""
    size, unit = float(nbytes), "B"
    for unit_ in _UNITS:
        if size < 999.95:  # what would be shown as 1000.0 belongs to the next unit
            break
        size, unit = size / 1000, unit_
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"


def lines(value: Readable) -> list[str]:
    """Return a value as lines: what is nested is indented, items of several lines start with a dash."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        parts = [lines(item) for item in value]
        dashed = any(len(part) > 1 for part in parts)
        return [line for part in parts for line in (_hang("- ", part) if dashed else part)]
    return [line for key, item in value.items() for line in _entry(key, lines(item))]


def _entry(key: str, part: list[str]) -> list[str]:
    return [f"{key}: {part[0]}"] if len(part) == 1 else [f"{key}:", *(f"  {line}" for line in part)]


def _hang(lead: str, part: list[str]) -> list[str]:
    return [lead + part[0], *(" " * len(lead) + line for line in part[1:])]


def aligned(report: dict[str, Any]) -> list[str]:
    """Return a report as lines with one column of names; long lines stay whole, for tools to search."""
    width = max(map(len, report), default=0)
    rows = ((key, lines(value)) for key, value in readable(report).items())
    return [f"{'' if number else key:<{width}}  {line}" for key, part in rows for number, line in enumerate(part)]


def table(report: dict[str, Any]) -> Any:
    """Return a report as a rich table, which wraps what is long and cuts nothing off."""
    return _cell(readable(report), style="bold")


def _cell(value: Readable, style: str = "") -> Any:
    from rich.table import Table
    from rich.text import Text

    if isinstance(value, str):
        return Text(value, overflow="fold")
    grid = Table.grid(padding=(0, 1 if isinstance(value, list) else 2, 0, 0))
    grid.add_column(overflow="fold")
    grid.add_column(overflow="fold")
    if isinstance(value, list) and len(value) == 1:
        return _cell(value[0])
    for lead, item in value.items() if isinstance(value, dict) else (("-", item) for item in value):
        grid.add_row(Text(lead, style), _cell(item))
    return grid
