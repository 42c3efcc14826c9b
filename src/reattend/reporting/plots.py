"""A report's plots, as PNG files' content: of measured numbers alone, and none where there are none."""

from collections.abc import Callable, Iterator
from io import BytesIO
from typing import TYPE_CHECKING, Any

from reattend.reporting.figures import per_layer, sensitivities

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH, _HEIGHT, _DPI = 6.4, 3.6, 110  # inches, inches, dots per inch
_BEFORE, _AFTER = "#8a8f98", "#1f6fb2"


def plots(content: dict[str, Any]) -> dict[str, bytes]:
    """Return name -> PNG of what a report's content has numbers for."""
    return {name: _drawn(draw, count) for name, count, draw in _wanted(content)}


def _wanted(content: dict[str, Any]) -> Iterator[tuple[str, int, Callable[..., None]]]:
    """Yield a plot's name, how many panels it has, and what draws them."""
    evaluation = content["evaluation"] or {}
    errors = content["verification"].get("layer_errors")
    if "perplexity" in evaluation:
        yield "perplexity", 1, lambda axes: _perplexity(axes, evaluation)
    if content["before"] is not None:
        yield "sizes", 2, lambda *axes: _sizes(axes, content)
    if errors:
        yield "layer_errors", 1, lambda axes: _layers(axes, {"output": errors}, "relative L2 error")
    found = per_layer(content["findings"], len(errors) if errors else 0)
    if found:
        yield "findings", 1, lambda axes: _layers(axes, found, "as measured")
    if "outliers" in evaluation:
        yield "outliers", 2, lambda *axes: _outliers(axes, evaluation)
    measured = sensitivities(content["findings"])
    if measured:
        yield "sensitivity", 1, lambda axes: _sensitivity(axes, measured)


def _drawn(draw: Callable[..., None], panels: int) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=_DPI, layout="constrained")
    draw(*figure.subplots(1, panels, squeeze=False)[0])
    picture = BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})  # the same numbers give the same bytes
    return picture.getvalue()


def _perplexity(axes: "Axes", evaluation: dict[str, Any]) -> None:
    shown = [("after", "", _AFTER)] if "base_perplexity" not in evaluation else [
        ("before", "base_", _BEFORE), ("after", "", _AFTER)
    ]  # fmt: skip
    for place, (_, prefix, colour) in enumerate(shown):
        value, error = evaluation[f"{prefix}perplexity"], evaluation[f"{prefix}perplexity_stderr"]
        axes.errorbar(place, value, yerr=error, fmt="o", color=colour, capsize=6)
        axes.annotate(f"{value:.3f}", (place, value), xytext=(10, -3), textcoords="offset points")
    axes.set_xticks(range(len(shown)), [name for name, _, _ in shown])
    axes.set_xlim(-0.5, len(shown) - 0.2)
    axes.set_ylabel("perplexity, ± standard error")


def _sizes(panels: tuple["Axes", ...], content: dict[str, Any]) -> None:
    for axes, key, title, unit in zip(
        panels, ("bytes", "cache_bytes_per_token"), ("weights", "KV cache per token"), (1e6, 1e3), strict=True
    ):
        pair = [content[when][key] / unit for when in ("before", "after")]
        bars = axes.bar(("before", "after"), pair, color=(_BEFORE, _AFTER), width=0.6)
        axes.bar_label(bars, fmt="%.4g")
        axes.margins(y=0.12)
        axes.set_title(title)
        axes.set_ylabel("MB" if unit == 1e6 else "kB")


def _layers(axes: "Axes", series: dict[str, list[float]], label: str) -> None:
    for name, values in series.items():
        axes.plot(values, marker=".", label=name)
    _by_layer(axes, label)
    if all(min(values) >= 0 for values in series.values()):
        axes.set_ylim(bottom=0.0, top=1.1 * max(max(values) for values in series.values()) or 1.0)
    if len(series) > 1:
        axes.legend(fontsize="small")


def _outliers(panels: tuple["Axes", ...], evaluation: dict[str, Any]) -> None:
    keys = ("layer_output_max_inf_norm", "sink_mass")
    for axes, key, label in zip(panels, keys, ("largest |activation|", "attention to the first token"), strict=True):
        for name, which, colour in (("before", "base_outliers", _BEFORE), ("after", "outliers", _AFTER)):
            if key in evaluation.get(which, {}):
                width = 3.5 if which == "base_outliers" else 1.5  # both are seen where they are equal
                axes.plot(evaluation[which][key], marker=".", color=colour, label=name, linewidth=width)
        _by_layer(axes, label)
        axes.legend(fontsize="small")
    panels[0].set_yscale("log")


def _sensitivity(axes: "Axes", measured: dict[str, list[tuple[int, float]]]) -> None:
    for kind, pairs in measured.items():
        axes.plot(*zip(*pairs, strict=True), marker=".", linestyle="none", label=kind)
    _by_layer(axes, "relative squared error of the layer's output")
    axes.set_yscale("log")
    axes.legend(fontsize="x-small")


def _by_layer(axes: "Axes", label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("layer")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
