"""Outliers of a running model: which modules put out large numbers, and how much attention the first key gets."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from reattend.calibration.attention_calls import during_calls, observed_attention
from reattend.calibration.layerwise import layers_in
from reattend.errors import Failure
from reattend.evaluation.outlier_statistics import SinkSums, inf_norm, kurtosis, sink_sums
from reattend.families.rows import Family
from reattend.kernels.attention import Options


@dataclass
class _Figures:
    """A module's inf-norm and kurtosis in every window."""

    inf_norms: list[float] = field(default_factory=list)
    kurtoses: list[float] = field(default_factory=list)

    def see(self, output: Tensor) -> None:
        self.inf_norms.append(inf_norm(output))
        self.kurtoses.append(kurtosis(output))

    @property
    def inf_norm(self) -> float:
        return sum(self.inf_norms) / len(self.inf_norms)

    @property
    def kurtosis(self) -> float:
        return sum(self.kurtoses) / len(self.kurtoses)


class OutlierMeter:
    """What was measured of a model so far; `report` says it."""

    def __init__(self, model: nn.Module, family: Family) -> None:
        self._layers = layers_in(model, family)
        self._outputs = [layer.get_submodule(family.attention_output) for layer in self._layers]
        self._names = {module: name for name, module in model.named_modules()}
        self._figures = {module: _Figures() for module in _measured_modules(model, family)}
        self._sinks: list[list[SinkSums]] = [[] for _ in self._layers]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Measure every window that the model runs, one a call."""
        with ExitStack() as stack:
            for module, figures in self._figures.items():
                stack.callback(module.register_forward_hook(_seeing(figures)).remove)
            for index, layer in enumerate(self._layers):
                stack.enter_context(during_calls(layer, self._observing(index, layer)))
            yield

    def _observing(self, index: int, layer: nn.Module) -> Callable[[], AbstractContextManager[None]]:
        def observe(query: Tensor, key: Tensor, value: Tensor, options: Options) -> None:
            self._sinks[index].append(sink_sums(query, key, options))

        return lambda: observed_attention(layer, observe)

    def report(self) -> dict[str, Any]:
        """Return the figures; those of layers as lists, first layer first. See docs/outliers.md for each key."""
        figures = self._figures
        worst = max(figures, key=lambda module: figures[module].inf_norm)
        found: dict[str, Any] = {
            "max_inf_norm": figures[worst].inf_norm,
            "max_inf_norm_module": self._names[worst],
            "average_kurtosis": sum(each.kurtosis for each in figures.values()) / len(figures),
        }
        for what, modules in (("attention_output", self._outputs), ("layer_output", self._layers)):
            found[f"{what}_max_inf_norm"] = [figures[module].inf_norm for module in modules]
            found[f"{what}_kurtosis"] = [figures[module].kurtosis for module in modules]
        return found | _sink_report(self._sinks)


def _seeing(figures: _Figures) -> Callable[[nn.Module, Any, Any], None]:
    def see(module: nn.Module, args: Any, output: Any) -> None:
        with torch.no_grad():
            figures.see(output[0] if isinstance(output, tuple) else output)

    return see


def _measured_modules(model: Any, family: Family) -> Iterator[nn.Module]:
    """Yield the modules whose outputs are measured: those that the paper's code watches in OPT.

    Layers, what attention and feed-forward add to the residual stream, and every norm of hidden states: a module
    with a weight vector as long as these are.
    """
    for layer in layers_in(model, family):
        yield layer
        for inner in (family.attention_output, family.feed_forward_output):
            if inner in family.linears:
                yield layer.get_submodule(inner)
    for module in model.base_model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.shape == (model.config.hidden_size,):
            yield module


def _sink_report(sinks: list[list[SinkSums]]) -> dict[str, Any]:
    found: dict[str, list[float]] = {"sink_mass": [], "sink_mass_max_head": [], "first_token_share": []}
    for index, windows in enumerate(sinks):
        queries = sum(window.queries for window in windows)
        if not queries:
            raise Failure(f"layer {index}: its attention function was not called, so its weights can't be measured")
        mass_H, largest_H = (torch.stack(sums).sum(0) / queries for sums in list(zip(*windows, strict=True))[:2])
        found["sink_mass"].append(float(mass_H.mean()))
        found["sink_mass_max_head"].append(float(mass_H.max()))
        found["first_token_share"].append(float(largest_H.mean()))
    return found
