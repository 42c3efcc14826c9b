"""keep: auto. Which linears stay in 16 bit, for a budget of perplexity on the selection text.

Linears are ranked by the error that each alone makes in its layer's output, per weight; how many of the worst are
kept is bisected on the measured perplexity of the whole model.
"""

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from reattend.calibration.divided import missing
from reattend.calibration.layerwise import LayerPass
from reattend.calibration.output_errors import output_errors
from reattend.calibration.search import fewest, rise, stored_loss
from reattend.errors import DeadEndError
from reattend.quantize.int8.simulation import Simulated, standing_in
from reattend.transform import Passes, Statistics

_TEXT = "selection"
# Gives a layer's linears as the output computes them, by name within the layer: all, or those among some full names.
Linears = Callable[[LayerPass, Container[str] | None], dict[str, Simulated]]


@dataclass(frozen=True)
class Keeping:
    """What `keep: auto` needs: linears by layer, the prefix of a layer's names, and the largest relative rise."""

    linears: Linears
    prefix: Callable[[int], str]
    budget: float

    def decide(self, passes: Passes, statistics: Statistics) -> None:
        """Measure; put `sensitivity` (MODULE: error, numbers) and `kept` (MODULE) into the statistics."""
        order = ranked(self._sensitivity(passes, statistics))

        def loss(count: int) -> float:
            return stored_loss(statistics, f"kept-{count}", lambda: self._losses(passes, set(order[count:])))

        count = fewest(0, len(order), lambda count: rise(loss(count), loss(len(order))) <= self.budget)
        if count == len(order):
            raise DeadEndError(
                f"int8: keep_budget: {self.budget} leaves no layer to quantise (measured on the {_TEXT} text)"
            )
        statistics["kept"] = {name: torch.tensor(True) for name in order[:count]}

    def _sensitivity(self, passes: Passes, statistics: Statistics) -> dict[str, Tensor]:
        if "sensitivity" not in statistics:
            parts = []
            for layer in passes(_TEXT):
                parts.append(f"sensitivity-{layer.index}")
                if missing(statistics, parts[-1]):
                    statistics[parts[-1]] = self._measured(layer)
            statistics["sensitivity"] = {name: value for part in parts for name, value in statistics[part].items()}
        return statistics["sensitivity"]

    def _measured(self, layer: LayerPass) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        linears = self.linears(layer, None)
        alone = {name: partial(standing_in, layer, {name: linear}) for name, linear in linears.items()}
        for name, error in output_errors(layer, _TEXT, alone).items():
            if not math.isfinite(error):
                layer.text = _TEXT
                raise layer.bad_numbers(f"with {name} in int8")
            numbers = linears[name].codes.numel()
            found[self.prefix(layer.index) + name] = torch.tensor([error, numbers], dtype=torch.float64)
        return found

    def _losses(self, passes: Passes, quantised: set[str]) -> Tensor:
        """The windows' losses with these linears in int8."""
        for layer in passes(_TEXT):
            with standing_in(layer, self.linears(layer, quantised)):
                layer.run()
        return passes.losses(_TEXT, layer.hidden[_TEXT])


def ranked(sensitivity: Mapping[str, Tensor]) -> list[str]:
    """Return linears by falling error per weight."""
    return sorted(sensitivity, key=lambda name: (-float(sensitivity[name][0] / sensitivity[name][1]), name))
