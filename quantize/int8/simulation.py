"""A layer of the source model with some of its linears computed as the output will compute them.

Smoothing is undone around each linear, so that every choice of linears can be tried in the source model.

Legend: N tokens, I input channels, O output channels.
"""

from collections.abc import Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reattend.calibration.layerwise import LayerPass
from reattend.families.source import Source
from reattend.kernels.int8_linear import Outliers, int8_linear
from reattend.quantize.int8.calibration import stored_dtype
from reattend.quantize.int8.formulas import quantize_channels
from reattend.quantize.int8.migration import input_factors, migrate, output_factors
from reattend.quantize.int8.side_files import chosen_outliers
from reattend.transform import Statistics


@dataclass(frozen=True)
class Simulated:
    """One linear on codes (O, I) and scales (O,), between the factors of its input (I,) and output (O,)."""

    codes: Tensor
    scale: Tensor
    options: Mapping[str, Any]
    input_factors: Tensor | None = None
    output_factors: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """A forward hook: return what stands in for the linear's output."""
        x = inputs[0] if self.input_factors is None else inputs[0] / self.input_factors
        y = int8_linear(x.to(inputs[0].dtype), self.codes, self.scale, **self.options)
        y = y if self.output_factors is None else (y * self.output_factors).to(y.dtype)
        bias: Any = module.bias
        return y if bias is None else y + bias


def codes_of(
    module: str, weight: Tensor, learned: Mapping[str, Tensor], source: Source, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return codes (O, I) and scales (O, 1) of a linear of a layer: those that were `learned`, else rounded here."""
    if f"{module}.codes" in learned:
        return learned[f"{module}.codes"], learned[f"{module}.scale"]
    moved = migrate(f"{module}.weight", weight, learned, source) if learned else weight
    return quantize_channels(moved, dtype)


def simulate(
    layer: LayerPass, name: str, learned: Mapping[str, Tensor], source: Source, options: Mapping[str, Any]
) -> Simulated:
    """Return a linear of a layer as the output computes it; `options` go to `int8_linear`."""
    weight = layer.module.get_parameter(f"{name}.weight").detach()
    codes, scale = codes_of(name, weight.cpu(), learned, source, stored_dtype(layer, source, name))
    around = input_factors(name, learned, source), output_factors(name, len(codes), learned, source)
    before, after = (factors if factors is None else factors.to(layer.device) for factors in around)
    outliers = options.get("outliers")
    if outliers is not None:
        options = {**options, "outliers": Outliers(*(part.to(layer.device) for part in outliers))}
    return Simulated(codes.to(layer.device), scale.flatten().to(layer.device), options, before, after)


@dataclass(frozen=True)
class Simulation:
    """The linears of the output, layer by layer: `modules` (full names), with what was learned and the `options`."""

    source: Source
    statistics: Statistics
    modules: tuple[str, ...]
    options: Mapping[str, Any]

    def __call__(self, layer: LayerPass, wanted: Container[str] | None = None) -> dict[str, Simulated]:
        """Return those of a layer that are `wanted` (default: all), by name within the layer."""
        index, prefix = str(layer.index), self.source.layer_prefix(layer.index)
        learned = self.statistics.get(index, {})
        outliers = chosen_outliers(layer.index, self.statistics) if "columns" in self.statistics else {}
        modules = [m for m in self.modules if m.startswith(prefix) and (wanted is None or m in wanted)]
        names = [module.removeprefix(prefix) for module in modules]
        chosen = {name: {**self.options, "outliers": outliers.get(name)} for name in names}
        return {name: simulate(layer, name, learned, self.source, chosen[name]) for name in names}


@contextmanager
def standing_in(layer: LayerPass, linears: Mapping[str, Simulated]) -> Iterator[None]:
    """Let `linears` compute in the place of the layer's own."""
    with ExitStack() as stack:
        for name, linear in linears.items():
            hook: Any = linear
            stack.callback(layer.module.get_submodule(name).register_forward_hook(hook).remove)
        yield
