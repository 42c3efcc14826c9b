"""What calibration of the int8 step measured and chose, as plain data."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from reattend.calibration.search import stored_perplexities
from reattend.quantize.int8.keeping import ranked
from reattend.transform import Statistics, layers_of


def findings(statistics: Statistics) -> dict[str, Any]:
    """Return what there is of: W8A8 error of smoothed inputs, number of static columns, linears kept."""
    layers = layers_of(statistics)
    found: dict[str, Any] = {}
    errors = [_errors(statistics[layer]) for layer in layers]
    for name in sorted({name for layer in errors for name in layer}):
        pairs = [layer.get(name, [None, None]) for layer in errors]
        found.setdefault("w8a8_error", {})[name] = dict(
            zip(("before", "after"), zip(*pairs, strict=True), strict=True)
        )
    counts = {name.partition(".")[::2]: int(count) for name, count in statistics.get("columns", {}).items()}
    for linear in sorted({linear for _, linear in counts}):
        found.setdefault("static_columns", {})[linear] = [counts.get((layer, linear)) for layer in layers]
    return found | (_measured(statistics) if "sensitivity" in statistics else {})


def _errors(learned: Mapping[str, Tensor]) -> dict[str, list[float]]:
    return {
        name.removesuffix(".error"): [float(f"{float(value):.3g}") for value in values]
        for name, values in learned.items()
        if name.endswith(".error")
    }


def _measured(statistics: Statistics) -> dict[str, Any]:
    """Return what is kept, if that is decided, each linear's error, and perplexities by the number kept."""
    errors = statistics["sensitivity"]
    measured = stored_perplexities(statistics, "kept-")
    kept = {"kept": sorted(statistics["kept"])} if "kept" in statistics else {}
    return kept | {
        "sensitivity": {name: float(f"{float(errors[name][0]):.3g}") for name in ranked(errors)},
        "selection_perplexity": {
            "source" if count == len(errors) else f"{count} kept": value for count, value in measured.items()
        },
    }
