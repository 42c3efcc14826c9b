"""What the int8 step learns from one layer.

Factors that smooth its inputs, codes that compensate for rounding, and columns that stay in floating point.
"""

from collections.abc import Iterable, Iterator
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
from reattend.quantize.int8.smoothing import best_factors

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
    quantised = sorted(name.removeprefix(prefix) for name in wanted.quantised if name.startswith(prefix))
    inputs = _Inputs(layer, moment=wanted.compensate)
    layer.run([(name, inputs.hook) for name in quantised])
    found: dict[str, Tensor] = {}
    for feed, shared in ((feed, inputs.of(feed.consumers)) for feed in source.family.feeds if wanted.smooth):
        if shared is not None:
            found |= _smoothed(layer, source, feed, shared)
    for number, shared in enumerate(inputs):
        if wanted.compensate:
            found |= _compensated(layer, source, shared, found)
        if wanted.static:
            found |= _static(layer, source, shared)
            found |= {f"{name}.input": torch.tensor(number) for name in shared.linears}
    return {name: value.cpu() for name, value in found.items()}


class _Inputs:
    """The inputs of a layer's linears: those called one after the other with the very same tensor share one."""

    def __init__(self, layer: LayerPass, *, moment: bool) -> None:
        self._layer, self._moment = layer, moment
        self._names = {id(module): name for name, module in layer.module.named_modules()}
        self._watches: dict[str, _Watch] = {}  # by the linear that was called first
        self._last: tuple[Tensor | None, str] = (None, "")

    def hook(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        """Take in one window's input of one linear."""
        name, x = self._names[id(module)], inputs[0]
        if x is self._last[0]:
            shared = self._watches[self._last[1]]
            shared.linears += (name,) if name not in shared.linears else ()
            return
        self._last = (x, name)
        watch = self._watches.setdefault(name, _Watch(self._layer, name, self._moment))
        watch.take(x.reshape(-1, x.shape[-1]))

    def __iter__(self) -> Iterator["_Watch"]:
        return iter(self._watches.values())

    def of(self, linears: Iterable[str]) -> "_Watch | None":
        """The input of the first of `linears` that was called."""
        return next((watch for watch in self if set(linears) & set(watch.linears)), None)


class _Watch:
    """One input: its channels' range, sampled rows of both texts and, where wanted, its second moment."""

    def __init__(self, layer: LayerPass, linear: str, moment: bool) -> None:
        self.linears: tuple[str, ...] = (linear,)
        self._layer, self._moment = layer, moment
        self.absmax: Tensor | None = None
        self.second: Tensor | None = None
        self._rows: dict[str, list[Tensor]] = {text: [] for text in layer.hidden}
        self._seen = dict.fromkeys(layer.hidden, 0)

    def take(self, x_NI: Tensor) -> None:
        """Take in one window of the text that runs."""
        text = self._layer.text
        if text == "calibration":
            here = x_NI.abs().amax(0)
            self.absmax = here if self.absmax is None else torch.maximum(self.absmax, here)
            if self._moment:
                self._add(x_NI.float())
        most = _FIT_ROWS if text == "calibration" else _CHOICE_ROWS
        rows = sampled(self._seen[text], len(self._layer.hidden[text]), len(x_NI), most)
        self._rows[text].append(x_NI[rows.to(x_NI.device)])
        self._seen[text] += 1

    def _add(self, x_NI: Tensor) -> None:
        """Add a window's second moment, its tokens relative to their energy: huge ones count as one each."""
        energy_N = x_NI.square().sum(1)
        relative = x_NI / (energy_N + 0.1 * energy_N.median() + torch.finfo(x_NI.dtype).tiny).sqrt()[:, None]
        here = (relative.T @ relative).double()
        self.second = here if self.second is None else self.second.add_(here)

    def finite_rows(self, text: str) -> Tensor:
        """The rows sampled from a text. Raises `Failure` for NaN and inf, naming a linear that takes them."""
        rows = torch.cat(self._rows[text])
        if not bool(torch.isfinite(rows).all()):
            raise Failure(f"layer {self._layer.index}, input of {self.linears[0]}: activations hold NaN or inf")
        return rows


def sampled(window: int, windows: int, tokens: int, most: int) -> Tensor:
    """Return the rows of one of `windows` windows of `tokens` that are looked at: about `most` of all of them.

    The middles of equal parts: a window's first token, on which attention rests, is one among the others. With more
    windows than `most`, one row of every n-th.
    """
    stride = -(-windows // most)
    if window % stride:
        return torch.empty(0, dtype=torch.int64)
    each = min(tokens, -(-most // windows))
    return ((torch.arange(each) + 0.5) * tokens / each).long()


def _smoothed(layer: LayerPass, source: Source, feed: Feed, shared: _Watch) -> dict[str, Tensor]:
    """The factors of one feed, as its producer can hold them."""
    assert shared.absmax is not None
    weights = [layer.module.get_parameter(f"{name}.weight").detach() for name in shared.linears]
    owner_I = owners(feed, source).to(shared.absmax.device)
    fit, choose = (shared.finite_rows(text) for text in ("calibration", "selection"))
    s_R, before, after = best_factors(fit, choose, weights, shared.absmax, owner_I)
    producer = layer.module.get_parameter(f"{feed.producer}.weight").detach()
    held = _dtype(layer, source, feed.producer)
    factors = s_R if producer.dim() > 1 else _held(producer.float(), s_R, held)
    return {
        f"{feed.producer}.factors": factors,
        f"{feed.producer}.error": torch.tensor([before, after]),
    }


def _dtype(layer: LayerPass, source: Source, module: str) -> torch.dtype:
    """The dtype in which the checkpoint holds a module's weight; the model may be loaded in another."""
    return TORCH_DTYPES[source.tensors[f"{source.layer_prefix(layer.index)}{module}.weight"].dtype]


def _held(norm_R: Tensor, s_R: Tensor, dtype: torch.dtype) -> Tensor:
    """The factors nearest to `s_R` that a norm's weight in `dtype` divides by without rounding."""
    exact = norm_R / (norm_R / s_R).to(dtype).float()
    return torch.where(torch.isfinite(exact) & (exact > 0), exact, torch.ones_like(exact))


def _compensated(layer: LayerPass, source: Source, shared: _Watch, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Codes and scales of the linears that take one input, smoothed by the factors that were `found`."""
    second, shared.second = shared.second, None  # the largest thing here: gone when this input is done
    assert second is not None
    if not bool(torch.isfinite(second).all()):
        raise Failure(f"layer {layer.index}, input of {shared.linears[0]}: activations hold NaN or inf")
    codes: dict[str, Tensor] = {}
    for feed in source.family.feeds:
        if set(feed.consumers) & set(shared.linears) and f"{feed.producer}.factors" in found:
            s_I = found[f"{feed.producer}.factors"][owners(feed, source).to(second.device)].double()
            second = second / torch.outer(s_I, s_I)
    for name in shared.linears:
        weight = layer.module.get_parameter(f"{name}.weight").detach()
        moved = migrate(f"{name}.weight", weight, found, source)
        _, scale = quantize_channels(moved.cpu(), _dtype(layer, source, name))
        codes[f"{name}.codes"] = compensated_codes(moved, scale.to(moved.device), second)
        codes[f"{name}.scale"] = scale
    return codes


def _static(layer: LayerPass, source: Source, shared: _Watch) -> dict[str, Tensor]:
    """The columns of one input that could stay in floating point, and their weights in the dtype of the source."""
    weights = {name: layer.module.get_parameter(f"{name}.weight").detach() for name in shared.linears}
    columns, curve = removal_order(shared.finite_rows("calibration"), list(weights.values()), MOST_COLUMNS)
    found = {
        f"{name}.slice": weight[:, columns.to(weight.device)].to(_dtype(layer, source, name))
        for name, weight in weights.items()
    }
    return {f"{shared.linears[0]}.columns": columns, f"{shared.linears[0]}.curve": curve} | found
