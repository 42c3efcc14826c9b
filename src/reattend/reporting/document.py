"""REPORT.md: what was measured of an output, and the commands that measure it again."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from reattend.checkpoint.index import PLOTS, REPORT
from reattend.reporting.figures import comparison, how_measured, rows
from reattend.reporting.readable import lines, readable

_TITLES = {
    "perplexity": "Perplexity, with standard errors",
    "sizes": "Sizes",
    "layer_errors": "Error of every layer's output",
    "findings": "What calibration measured, layer by layer",
    "outliers": "Outliers",
    "sensitivity": "What int8 in one linear layer alone costs",
}


def document(content: dict[str, Any], drawn: Sequence[str]) -> str:
    """Return the report as Markdown; `drawn` names the plots that there are."""
    parts = [
        "# Report",
        f"What reattend {content['reattend']} measured; all of it, with the commands, is also in `{REPORT}`.",
        *_verdict(content),
        "## Before and after",
        table(("", "before", "after"), rows(content)),
        *_compared(content),
        how_measured(content),
        *(f"![{_TITLES[name]}]({PLOTS}/{name}.png)" for name in drawn),
        *_findings(content),
        *_gaps(content),
        *_commands(content),
    ]
    return "\n\n".join(parts) + "\n"


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines_ = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines_)


def _verdict(content: dict[str, Any]) -> Iterator[str]:
    problems = content["verification"]["problems"]
    if problems:
        yield f"**Unsound: verification found {len(problems)} problems.**"
        yield "\n".join(f"- {problem}" for problem in problems)
    else:
        yield "Verified in a fresh process by stock transformers: strict load, finite numbers, sizes as headers say."


def _compared(content: dict[str, Any]) -> Iterator[str]:
    found = list(comparison(content))
    if found:
        yield table(("against its source", ""), found)


def _findings(content: dict[str, Any]) -> Iterator[str]:
    for step, found in zip(content["recipe"]["steps"], content["findings"], strict=False):
        if found:
            yield f"## Found by `{step['step']}`"
            yield code(lines(readable(found)))


def _gaps(content: dict[str, Any]) -> Iterator[str]:
    if content["not_measured"]:
        yield "## Not measured"
        yield table(("what", "by what"), [(what, f"`{by}`") for what, by in content["not_measured"].items()])


def _commands(content: dict[str, Any]) -> Iterator[str]:
    yield "## The same numbers again"
    yield table(("variable", "stands for"), [(f"`{name}`", what) for name, what in content["variables"].items()])
    yield code([f"{command}   # {section}" for section, command in content["commands"].items()])


def code(content: Iterable[str], language: str = "") -> str:
    """Return lines as a code block."""
    return "\n".join([f"```{language}", *content, "```"])
