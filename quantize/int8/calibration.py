"""What the int8 step learns from one layer.

Factors that smooth its inputs, codes that compensate for rounding, and columns that stay in floating point.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from reattend.calibration.layerwise import LayerPass
from reattend.checkpoint.tensors import TORCH_DTYPES
from reattend.families.rows import Feed
from reattend.families.source import Source
from reattend.quantize.int8.compensation import compensated_codes
from reattend.quantize.int8.formulas import channel_scale
from reattend.quantize.int8.inputs import Inputs, SharedInput
from reattend.quantize.int8.migration import migrate, owners
from reattend.quantize.int8.outliers import removal_order
from reattend.quantize.int8.smoothing import best_factors

MOST_COLUMNS = 128  # of an input that may stay in floating point


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
    inputs = Inputs(layer, moment=wanted.compensate)
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


def _smoothed(layer: LayerPass, source: Source, feed: Feed, shared: SharedInput) -> dict[str, Tensor]:
    """The factors of one feed, as its producer can hold them."""
    assert shared.absmax is not None
    weights = [layer.module.get_parameter(f"{name}.weight").detach() for name in shared.linears]
    owner_I = owners(feed, source).to(shared.absmax.device)
    fit, choose = (shared.finite_rows(text) for text in ("calibration", "selection"))
    emphasis = shared.emphasis("calibration"), shared.emphasis("selection")
    s_R, before, after = best_factors(fit, choose, weights, shared.absmax, owner_I, emphasis)
    producer = layer.module.get_parameter(f"{feed.producer}.weight").detach()
    held = stored_dtype(layer, source, feed.producer)
    factors = s_R if producer.dim() > 1 else _held(producer.float(), s_R, held)
    return {
        f"{feed.producer}.factors": factors,
        f"{feed.producer}.error": torch.tensor([before, after]),
    }


def stored_dtype(layer: LayerPass, source: Source, module: str) -> torch.dtype:
    """The dtype in which the checkpoint holds a module's weight; the model may be loaded in another."""
    return TORCH_DTYPES[source.tensors[f"{source.layer_prefix(layer.index)}{module}.weight"].dtype]


def _held(norm_R: Tensor, s_R: Tensor, dtype: torch.dtype) -> Tensor:
    """The factors nearest to `s_R` that a norm's weight in `dtype` divides by without rounding."""
    exact = norm_R / (norm_R / s_R).to(dtype).float()
    return torch.where(torch.isfinite(exact) & (exact > 0), exact, torch.ones_like(exact))


def _compensated(
    layer: LayerPass, source: Source, shared: SharedInput, found: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Codes and scales of the linears that take one input, smoothed by the factors that were `found`."""
    second, shared.second = shared.second, None  # the largest thing here: gone when this input is done
    assert second is not None
    if not bool(torch.isfinite(second).all()):
        raise layer.bad_numbers(f"input of {shared.linears[0]}")
    codes: dict[str, Tensor] = {}
    for feed in source.family.feeds:
        if set(feed.consumers) & set(shared.linears) and f"{feed.producer}.factors" in found:
            s_I = found[f"{feed.producer}.factors"][owners(feed, source).to(second.device)].double()
            second = second / torch.outer(s_I, s_I)
    for name in shared.linears:
        weight = layer.module.get_parameter(f"{name}.weight").detach()
        moved = migrate(f"{name}.weight", weight, found, source)
        scale = channel_scale(moved, stored_dtype(layer, source, name))
        codes[f"{name}.codes"] = compensated_codes(moved, scale, second)
        codes[f"{name}.scale"] = scale
    return codes


def _static(layer: LayerPass, source: Source, shared: SharedInput) -> dict[str, Tensor]:
    """The columns of one input that could stay in floating point, and their weights in the dtype of the source."""
    weights = {name: layer.module.get_parameter(f"{name}.weight").detach() for name in shared.linears}
    columns, curve = removal_order(shared.finite_rows("calibration"), list(weights.values()), MOST_COLUMNS)
    found = {
        f"{name}.slice": weight[:, columns.to(weight.device)].to(stored_dtype(layer, source, name))
        for name, weight in weights.items()
    }
    return {f"{shared.linears[0]}.columns": columns, f"{shared.linears[0]}.curve": curve} | found
