"""A report's numbers by what they are about: what its tables, plots and card all show."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from reattend.reporting.readable import human

NOT_MEASURED = "not measured"
_LAYER = re.compile(r"\.(\d+)\.(.+)")


class Row(NamedTuple):
    """One line of the table of what changed."""

    what: str
    before: str
    after: str


def rows(content: dict[str, Any]) -> list[Row]:
    """Return what is known of sizes and perplexity, before and after."""
    before, after, evaluation = content["before"] or {}, content["after"], content["evaluation"] or {}
    found = [
        Row("weights", _size(before.get("bytes")), _size(after["bytes"])),
        Row("parameters", _count(before.get("parameters")), _count(after["parameters"])),
        Row(
            "KV cache per token, in the model's dtype",
            _size(before.get("cache_bytes_per_token")),
            _size(after["cache_bytes_per_token"]),
        ),
    ]
    if "cache_bytes_per_token" in evaluation:
        dtype = evaluation["dtype"]
        pair = (evaluation.get(key) for key in ("base_cache_bytes_per_token", "cache_bytes_per_token"))
        found.append(Row(f"KV cache per token, measured in {dtype}", *map(_size, pair)))
    pairs = (("base_perplexity", "base_perplexity_stderr"), ("perplexity", "perplexity_stderr"))
    found.append(Row("perplexity", *(with_error(*map(evaluation.get, keys)) for keys in pairs)))
    return found


def comparison(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what was measured of the output against its source, token by token."""
    verification, evaluation = content["verification"], content["evaluation"] or {}
    if verification.get("logits_error") is not None:
        allowed = f"{number(verification['logits_error'])} (allowed {number(verification['tolerance'])})"
        yield "relative error of logits, a short passage in fp32", allowed
    if "delta" in evaluation:
        yield "change of perplexity, paired by window", with_error(evaluation["delta"], evaluation["delta_stderr"])
        yield "KL divergence, nats per token", number(evaluation["kl_mean"])
        yield "same most likely token", f"{100 * evaluation['top1_agreement']:.2f} %"
    if "bits_per_byte" in evaluation:
        yield "bits per byte", number(evaluation["bits_per_byte"])


def summary(content: dict[str, Any]) -> dict[str, Any]:
    """Return the figures for a terminal, and what is missing."""
    told = {what: f"{before} -> {after}" for what, before, after in rows(content)} | dict(comparison(content))
    problems = {"problems": content["verification"]["problems"]}
    return told | problems | {key: content[key] for key in ("engines", "not_measured", "remarks") if content[key]}


def how_measured(content: dict[str, Any]) -> str:
    """Say on what perplexity was measured, and how."""
    found = content["evaluation"]
    if found is None or "perplexity" not in found:
        return "Perplexity was not measured."
    return (
        f"Perplexity on {found['text']} (sha256 {found['text_sha256'][:16]}): {found['windows']} disjoint windows of "
        f"{found['window']} tokens, {found['tokens']} tokens predicted, BOS {found['bos']}, {found['dtype']}, "
        f"runtime {found['runtime']}. Errors are standard errors over windows."
    )


def per_layer(findings: list[dict[str, Any]], layers: int) -> dict[str, list[float]]:
    """Return what steps measured in every layer, by name: lists of as many numbers as there are layers."""
    return {name: values for name, values in _lists(findings, "") if len(values) == layers}


def _lists(value: Any, name: str) -> Iterator[tuple[str, list[float]]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _lists(item, f"{name}{' ' if name else ''}{str(key).replace('_', ' ')}")
    elif isinstance(value, list) and value and all(isinstance(item, (dict, list)) for item in value):
        for item in value:
            yield from _lists(item, name)
    elif isinstance(value, list) and value and all(isinstance(item, float) for item in value):
        yield name, value


def sensitivities(findings: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Return kind of linear layer -> (layer, error that it alone makes), as `keep: auto` measured it."""
    found: dict[str, list[tuple[int, float]]] = {}
    for measured in findings:
        for name, error in measured.get("sensitivity", {}).items():
            if place := _LAYER.search(name):
                found.setdefault(place[2], []).append((int(place[1]), float(error)))
    return {kind: sorted(pairs) for kind, pairs in found.items()}


def number(value: float | None) -> str:
    """Return a number as tables have it."""
    return NOT_MEASURED if value is None else f"{value:.4g}"


def with_error(value: float | None, error: float | None) -> str:
    """Return a value with its standard error, where there is one."""
    if value is None:
        return NOT_MEASURED
    return f"{value:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _size(nbytes: float | None) -> str:
    return NOT_MEASURED if nbytes is None else human(nbytes)


def _count(count: int | None) -> str:
    return NOT_MEASURED if count is None else f"{count:,}".replace(",", " ")
