"""What the int8 step learns from one layer.

Factors that smooth its inputs, codes that compensate for rounding, and columns that stay in floating point.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reattend.calibration.layerwise import LayerPass
from reattend.checkpoint.tensors import TORCH_DTYPES
from reattend.errors import Failure
from reattend.families.rows import Feed
from reattend.families.source import Source
from reattend.quantize.int8.compensation import compensated_codes
from reattend.quantize.int8.formulas import quantize_channels
from reattend.quantize.int8.migration import migrate, owners
from reattend.quantize.int8.outliers import removal_order
from reattend.quantize.int8.smoothing import ExpectedError, best_factors

MOST_COLUMNS = 128  # of an input that may stay in floating point
_FIT_ROWS, _CHOICE_ROWS = 4096, 2048  # tokens that the search looks at: enough to rank, bounded in memory


@dataclass(frozen=True)
class Learned:
    """What to learn, for the linears `quantised` (full names)."""

    quantised: frozenset[str]
    smooth: bool = False
    compensate: bool = False
    static: bool = False


def learn_layer(layer: LayerPass, source: Source, wanted: Learned) -> dict[str, Tensor]:
    """Run a layer and return what `Learned` asks for, on the CPU, by names within the layer.

    `PRODUCER.factors` (R,), `PRODUCER.error` (2,) = the W8A8 error before and after smoothing, on the selection
    text; `LINEAR.codes` (O, I) and `LINEAR.scale` (O, 1); for the first linear of each input `LINEAR.columns` (K,) in
    the order of their removal and `LINEAR.curve` (K + 1,), the error with the first k removed; for each linear
    `LINEAR.slice` (O, K) in the weight's dtype and `LINEAR.input`, a number that those with one input share.
    """
    prefix = source.layer_prefix(layer.index)
    inputs = _inputs(source, {name.removeprefix(prefix) for name in wanted.quantised if name.startswith(prefix)})
    watches = [_Watch(layer, wanted.compensate) for _ in inputs]
    layer.run([(shared.linears[0], watch.hook) for shared, watch in zip(inputs, watches, strict=True)])
    found: dict[str, Tensor] = {}
    for shared, watch in zip(inputs, watches, strict=True):
        if wanted.smooth and shared.feed is not None:
            found |= _smoothed(layer, source, shared, watch)
    for shared, watch in zip(inputs, watches, strict=True):
        if wanted.compensate:
            found |= _compensated(layer, source, shared, watch, found)
    for number, (shared, watch) in enumerate(zip(inputs, watches, strict=True)):
        if wanted.static:
            found |= _static(layer, source, shared, watch) | {
                f"{name}.input": torch.tensor(number) for name in shared.linears
            }
    return {name: value.cpu() for name, value in found.items()}


@dataclass(frozen=True)
class _Input:
    """An input, the quantised linears that take it, and the feed that it comes from, if it is one."""

    linears: tuple[str, ...]
    feed: Feed | None = None


def _inputs(source: Source, quantised: set[str]) -> list[_Input]:
    """The inputs of a layer's quantised linears; a linear that belongs to no feed has one of its own."""
    feeds = source.family.feeds
    found = [_Input(tuple(n for n in feed.consumers if n in quantised), feed) for feed in feeds]
    fed = {name for feed in feeds for name in feed.consumers}
    return [shared for shared in found if shared.linears] + [_Input((name,)) for name in sorted(quantised - fed)]


class _Watch:
    """One input: its channels' range, sampled rows of both texts and, where wanted, its second moment."""

    def __init__(self, layer: LayerPass, moment: bool) -> None:
        self._layer, self._moment = layer, moment
        self.absmax: Tensor | None = None
        self.second: Tensor | None = None
        self._rows: dict[str, list[Tensor]] = {"calibration": [], "selection": []}

    def hook(self, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        """Take in one window of the text that runs."""
        x_NI = inputs[0].reshape(-1, inputs[0].shape[-1])
        text = self._layer.text
        if text == "calibration":
            here = x_NI.abs().amax(0)
            self.absmax = here if self.absmax is None else torch.maximum(self.absmax, here)
            if self._moment:
                self._add(x_NI.float())
        most = _FIT_ROWS if text == "calibration" else _CHOICE_ROWS
        each = -(-most // len(self._layer.hidden[text]))
        taken = torch.linspace(0, len(x_NI) - 1, min(each, len(x_NI)), device=x_NI.device).long()
        self._rows[text].append(x_NI[taken])

    def _add(self, x_NI: Tensor) -> None:
        """Add a window's second moment, its tokens relative to their energy: huge ones count as one each."""
        energy_N = x_NI.square().sum(1)
        relative = x_NI / (energy_N + 0.1 * energy_N.median() + torch.finfo(x_NI.dtype).tiny).sqrt()[:, None]
        here = (relative.T @ relative).double()
        self.second = here if self.second is None else self.second.add_(here)

    def finite_rows(self, text: str, linear: str) -> Tensor:
        """The rows sampled from a text. Raises `Failure` for NaN and inf, naming the `linear` that takes them."""
        rows = torch.cat(self._rows[text])
        if not bool(torch.isfinite(rows).all()):
            raise Failure(f"layer {self._layer.index}, input of {linear}: activations hold NaN or inf")
        return rows


def _smoothed(layer: LayerPass, source: Source, shared: _Input, watch: _Watch) -> dict[str, Tensor]:
    """The factors of one feed, as its producer can hold them."""
    assert shared.feed is not None
    assert watch.absmax is not None
    weights = [layer.module.get_parameter(f"{name}.weight").detach() for name in shared.linears]
    owner_I = owners(shared.feed, source).to(watch.absmax.device)
    fit, choose = (watch.finite_rows(text, shared.linears[0]) for text in ("calibration", "selection"))
    s_R, before, after = best_factors(fit, choose, weights, watch.absmax, owner_I)
    producer = layer.module.get_parameter(f"{shared.feed.producer}.weight").detach()
    held = _dtype(layer, source, shared.feed.producer)
    factors = s_R if producer.dim() > 1 else _held(producer.float(), s_R, held)
    return {
        f"{shared.feed.producer}.factors": factors,
        f"{shared.feed.producer}.error": torch.tensor([before, after]),
    }


def _dtype(layer: LayerPass, source: Source, module: str) -> torch.dtype:
    """The dtype in which the checkpoint holds a module's weight; the model may be loaded in another."""
    return TORCH_DTYPES[source.tensors[f"{source.layer_prefix(layer.index)}{module}.weight"].dtype]


def _held(norm_R: Tensor, s_R: Tensor, dtype: torch.dtype) -> Tensor:
    """The factors nearest to `s_R` that a norm's weight in `dtype` divides by without rounding."""
    exact = norm_R / (norm_R / s_R).to(dtype).float()
    return torch.where(torch.isfinite(exact) & (exact > 0), exact, torch.ones_like(exact))


def _compensated(
    layer: LayerPass, source: Source, shared: _Input, watch: _Watch, found: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Codes and scales of the linears that take one input, smoothed by the factors that were `found`."""
    assert watch.second is not None
    if not bool(torch.isfinite(watch.second).all()):
        raise Failure(f"layer {layer.index}, input of {shared.linears[0]}: activations hold NaN or inf")
    codes: dict[str, Tensor] = {}
    second = watch.second
    if shared.feed is not None and f"{shared.feed.producer}.factors" in found:
        s_I = found[f"{shared.feed.producer}.factors"][owners(shared.feed, source).to(second.device)].double()
        second = second / torch.outer(s_I, s_I)
    for name in shared.linears:
        weight = layer.module.get_parameter(f"{name}.weight").detach()
        moved = migrate(f"{name}.weight", weight, found, source)
        _, scale = quantize_channels(moved.cpu(), _dtype(layer, source, name))
        codes[f"{name}.codes"] = compensated_codes(moved, scale.to(moved.device), second)
        codes[f"{name}.scale"] = scale
    return codes


def _static(layer: LayerPass, source: Source, shared: _Input, watch: _Watch) -> dict[str, Tensor]:
    """The columns of one input that could stay in floating point, and their weights in the dtype of the source."""
    weights = {name: layer.module.get_parameter(f"{name}.weight").detach() for name in shared.linears}
    rows = watch.finite_rows("calibration", shared.linears[0])
    columns, curve = removal_order(ExpectedError(rows, list(weights.values())), MOST_COLUMNS)
    found = {
        f"{name}.slice": weight[:, columns.to(weight.device)].to(_dtype(layer, source, name))
        for name, weight in weights.items()
    }
    return {f"{shared.linears[0]}.columns": columns, f"{shared.linears[0]}.curve": curve} | found
