"""keep: auto. Which linears stay in 16 bit, for a budget of perplexity on the selection text.

Linears are ranked by the error that each alone makes in its layer's output, per weight; how many of the worst are
kept is bisected on the measured perplexity of the whole model.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from reattend.calibration.layerwise import LayerPass
from reattend.calibration.search import fewest
from reattend.errors import BadNumbersError, DeadEndError
from reattend.quantize.int8.simulation import Simulated, output_errors, standing_in
from reattend.transform import Passes, Statistics

_TEXT = "selection"
# Gives a layer's linears as the output computes them, by name within the layer.
Linears = Callable[[LayerPass], dict[str, Simulated]]


@dataclass(frozen=True)
class Keeping:
    """What `keep: auto` needs: linears by layer, the prefix of a layer's names, and the largest relative rise."""

    linears: Linears
    prefix: Callable[[int], str]
    budget: float

    def decide(self, passes: Passes, statistics: Statistics) -> None:
        """Measure; put `sensitivity` (MODULE: error, numbers) and `kept` (MODULE) into the statistics."""
        if "sensitivity" not in statistics:
            statistics["sensitivity"] = self._measured(passes)
        order = ranked(statistics["sensitivity"])
        base = self._loss(passes, statistics, order, len(order))

        def fits(count: int) -> bool:
            return math.expm1(self._loss(passes, statistics, order, count) - base) <= self.budget

        count = fewest(len(order), fits)
        if count == len(order):
            raise DeadEndError(
                f"int8: keep_budget: {self.budget} leaves no layer to quantise (measured on the {_TEXT} text)"
            )
        statistics["kept"] = {name: torch.tensor(True) for name in order[:count]}

    def _measured(self, passes: Passes) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for layer in passes(_TEXT):
            linears = self.linears(layer)
            for name, error in output_errors(layer, _TEXT, linears).items():
                if not math.isfinite(error):
                    raise BadNumbersError(f"layer {layer.index}: with {name} in int8 its output is NaN or inf")
                found[self.prefix(layer.index) + name] = torch.tensor(
                    [error, linears[name].codes.numel()], dtype=torch.float64
                )
        return found

    def _loss(self, passes: Passes, statistics: Statistics, order: list[str], count: int) -> float:
        """The mean loss with the first `count` of `order` kept, measured once."""
        if f"kept-{count}" not in statistics:
            kept = set(order[:count])
            for layer in passes(_TEXT):
                linears = self.linears(layer) if count < len(order) else {}
                prefix = self.prefix(layer.index)
                with standing_in(layer, {n: linear for n, linear in linears.items() if prefix + n not in kept}):
                    layer.run()
            statistics[f"kept-{count}"] = {"losses": passes.losses(_TEXT, layer.hidden[_TEXT])}
        return float(statistics[f"kept-{count}"]["losses"].mean())


def ranked(sensitivity: Mapping[str, Tensor]) -> list[str]:
    """Return linears by falling error per weight."""
    return sorted(sensitivity, key=lambda name: (-float(sensitivity[name][0] / sensitivity[name][1]), name))
