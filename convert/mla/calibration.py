"""From passes over the layers to converted layers: moments, the frequency list, the choice, the refit.

Two passes are made. The first gathers every layer's second moments, from which one list of frequencies for
all layers follows, or one for each; the second converts layer by layer. Choices are measured on the source layer's
own inputs; the fit is on what the layers converted before put out (`prefix`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from reattend.calibration.fitting import Schedule, output_error
from reattend.calibration.layerwise import Hook, LayerPass
from reattend.convert.mla.attention import (
    LatentAttention,
    SourceAttention,
    compose,
    read_source,
)
from reattend.convert.mla.closed_form import Choice, best_choice, convert_layer
from reattend.convert.mla.geometry import Geometry
from reattend.convert.mla.prefix import Prefix
from reattend.convert.mla.queries import truncate_queries
from reattend.convert.mla.refit import fit_output, refit
from reattend.convert.mla.rotation import Components, rotate_heads
from reattend.convert.mla.selection import RopePart, assign_slots, common_list, drop_cost, slot_gain, strongest
from reattend.convert.mla.statistics import LayerMoments, MomentAccumulator, TokenMoments, mean_phase
from reattend.errors import Failure
from reattend.transform import Statistics, layers_of

_PARTS = ("plain", "attended")
# Enough for second moments: with 192 windows a third of the time went into them.
MOMENT_WINDOWS = 24


def gather_moments(layer: LayerPass, geometry: Geometry, tokens: int) -> dict[str, Tensor]:
    """Run a layer on the calibration text alone and return its moments over it, as tensors to be stored."""
    accumulator = MomentAccumulator(
        geometry.heads, geometry.kv_heads, geometry.rotary, tokens, geometry.scale, geometry.window(layer.index)
    )
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Hook:
        return lambda module, args, kwargs, output: seen.__setitem__(name, output[0].cpu().float())

    def add(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        q, k, v = (seen[n].view(len(seen[n]), -1, geometry.head_dim) for n in "qkv")
        accumulator.add(q, k, v)

    layer.run([*((f"self_attn.{module}", keep(module[0])) for module in _last_modules(layer)), ("self_attn", add)])
    return store_moments(accumulator.result())


def _last_modules(layer: LayerPass) -> tuple[str, ...]:
    """Return the modules that put out queries, keys and values before RoPE."""
    parts = dict(layer.module.get_submodule("self_attn").named_children())
    return ("q_norm", "k_norm", "v_proj") if "q_norm" in parts else ("q_proj", "k_proj", "v_proj")


def store_moments(moments: LayerMoments) -> dict[str, Tensor]:
    """Flatten moments into named tensors."""
    parts = {name: getattr(moments, name) for name in _PARTS}
    flat = {f"{name}.second": part.second_ZZ for name, part in parts.items()}
    flat |= {f"{name}.mean": part.mean_Z for name, part in parts.items()}
    return flat | {"query": moments.query_HDD, "distance": moments.distance_T}


def read_moments(stored: Mapping[str, Tensor]) -> LayerMoments:
    """Undo `store_moments`."""
    plain, attended = (TokenMoments(stored[f"{n}.second"], stored[f"{n}.mean"]) for n in _PARTS)
    return LayerMoments(plain, attended, stored["query"], stored["distance"])


def components_of(moments: LayerMoments) -> Components:
    """Rotate a layer's pairs across KV heads, keys weighted half by the attention that they receive."""
    width = moments.query_HDD.shape[-1] * moments.kv_shape[0]
    tokens = moments.plain.mix(moments.attended, Choice().attended_share)
    return rotate_heads(tokens.second_ZZ[:width, :width], moments.query_HDD)


def slots_of_all(
    layers: Iterable[LayerMoments], geometry: Geometry, slots: int, fixed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the model's list of source frequencies (S,) and the component that each layer puts there (Y, S).

    `fixed` is a list that the target prescribes.
    """
    frequency_F = geometry.rotary.frequency_F
    gains, costs = [], []
    for moments in layers:
        parts = components_of(moments)
        gains.append(slot_gain(parts, frequency_F, moments.distance_T))
        costs.append(drop_cost(parts, mean_phase(frequency_F, moments.distance_T)).sum())
    gain_YNF = torch.stack(gains)
    pair_S = common_list(gain_YNF, torch.stack(costs), slots) if fixed is None else fixed
    return pair_S, assign_slots(gain_YNF[..., pair_S])[1]


def own_slots(layers: Iterable[LayerMoments], geometry: Geometry, slots: int) -> tuple[Tensor, Tensor]:
    """Return the same with a list per layer, (Y, S) and (Y, S): what keeps RoPE turns at its own frequency."""
    parts = []
    for moments in layers:
        phase_F = mean_phase(geometry.rotary.frequency_F, moments.distance_T)
        parts.append(strongest(components_of(moments), phase_F, slots))
    return torch.stack([part.pair_S for part in parts]), torch.stack([part.kept_S for part in parts])


@dataclass(frozen=True)
class Conversion:
    """How layers are converted: sizes, whether a bias can hold the values' mean, the fit (None: no refit)."""

    geometry: Geometry
    latent_rank: int
    centred: bool
    schedule: Schedule | None
    query_rank: int | None = None


def convert(
    layer: LayerPass,
    moments: LayerMoments,
    rope: tuple[Tensor, Tensor],
    how: Conversion,
    prefix: Prefix | None = None,
) -> tuple[LatentAttention, dict[str, float]]:
    """Run a layer and return its conversion, and the relative errors of its output on the selection text.

    `rope` are the layer's list of source frequencies and its components there, as `slots_of_all` finds them. With
    `prefix` the refit, and the errors then, are on what the converted layers before put out; what they miss of the
    source's states is then the layer's to add.
    """
    before = {} if prefix is None else {text: states.clone() for text, states in layer.hidden.items()}
    seen = _watch_attention(layer)
    closed_form = _closed_forms(layer, moments, rope, how)
    choice, closed = best_choice(lambda tried: _error(closed_form(tried, how.latent_rank), *seen["selection"]))
    best = closed_form(choice, how.latent_rank)
    if prefix is not None:
        seen = _behind(prefix, layer, before, seen)
        closed = _error(best, *seen["selection"])
    errors = {"closed_form": closed}
    if how.schedule is not None:
        try:
            best, errors["refit"] = _fitted(best, closed, seen, how)
        except FloatingPointError as error:
            raise Failure(f"mla: layer {layer.index}: {error}") from error
    if how.query_rank is not None:
        best = _with_query_rank(best, seen["calibration"], how)
        errors["query_rank"] = _error(best, *seen["selection"])
    return best, errors


def _closed_forms(
    layer: LayerPass, moments: LayerMoments, rope: tuple[Tensor, Tensor], how: Conversion
) -> Callable[[Choice, int], LatentAttention]:
    """Return what makes the layer's closed form, given a choice and a rank."""
    source = source_attention(layer, how.geometry)
    phase_F = mean_phase(how.geometry.rotary.frequency_F, moments.distance_T)
    part = RopePart(components_of(moments), rope[1], rope[0], phase_F)

    def closed_form(choice: Choice, rank: int) -> LatentAttention:
        maps = convert_layer(moments, source.o_EHD.double(), part, rank, choice, centred=how.centred)
        return compose(source, maps)

    return closed_form


def errors_at(
    layer: LayerPass, moments: LayerMoments, rope: tuple[Tensor, Tensor], how: Conversion, ranks: Iterable[int]
) -> Tensor:
    """Run a layer; return what its closed forms at `ranks` put wrong in the states that leave it, fp64.

    That is the mean over the selection text's tokens of |ours - source|^2 / |state|^2: layers add to one stream, so a
    small output may be wrong. What is chosen per layer is left at its default; `convert` chooses at the rank found.
    """
    x_WTE, y_WTE = _watch_attention(layer)["selection"]
    closed_form = _closed_forms(layer, moments, rope, how)
    size_WT = layer.hidden["selection"].float().square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)

    def error(attention: LatentAttention) -> float:
        with torch.inference_mode():
            missed_WTE = attention.to(torch.float32).attend(x_WTE) - y_WTE
        return float((missed_WTE.square().sum(-1) / size_WT).mean())

    return torch.tensor([error(closed_form(Choice(), rank)) for rank in ranks], dtype=torch.float64)


def source_attention(layer: LayerPass, geometry: Geometry) -> SourceAttention:
    """Return the layer's own attention as plain tensors, on the CPU."""
    module: Any = layer.module.get_submodule("self_attn")
    tensors = {name: value.detach().cpu() for name, value in module.state_dict().items()}
    source = read_source(tensors, geometry.head_dim, geometry.rotary, geometry.scale)
    return replace(source, norm_eps=geometry.norm_eps, window=geometry.window(layer.index))


def _behind(
    prefix: Prefix, layer: LayerPass, before: dict[str, Tensor], seen: dict[str, tuple[Tensor, Tensor]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return what the layer reads behind the prefix, and what it should put out; `before` and `seen` are used up."""
    missing, inputs = prefix.missing(before), prefix.inputs(layer)
    before.clear()
    return {text: (inputs[text], missing.pop(text).add_(seen.pop(text)[1])) for text in list(seen)}


def _with_query_rank(layer: LatentAttention, calibration: tuple[Tensor, Tensor], how: Conversion) -> LatentAttention:
    """Truncate the queries; a refit then has `o_proj` make up for what that cost."""
    assert how.query_rank is not None
    truncated = truncate_queries(layer, how.query_rank, calibration[0])
    return truncated if how.schedule is None else fit_output(truncated.to(torch.float32), *calibration)


def _fitted(
    closed: LatentAttention, error: float, seen: dict[str, tuple[Tensor, Tensor]], how: Conversion
) -> tuple[LatentAttention, float]:
    """Refit a layer; keep the closed form where the fit is no better on the selection text."""
    assert how.schedule is not None
    fitted, _ = refit(closed, *seen["calibration"], how.schedule)
    after = _error(fitted, *seen["selection"])
    return (fitted, after) if after < error else (closed, error)


def errors_per_layer(statistics: Statistics) -> dict[str, list[float]]:
    """Return the errors that `convert` measured, by kind, for the layers in order."""
    errors: dict[str, list[float]] = {}
    for name in layers_of(statistics):
        for key, value in statistics[name].items():
            if key.startswith("error."):
                errors.setdefault(key.removeprefix("error."), []).append(float(f"{float(value):.4g}"))
    return errors


def _error(layer: LatentAttention, x_BTE: Tensor, y_BTE: Tensor) -> float:
    with torch.inference_mode():
        return float(output_error(layer.to(torch.float32).attend(x_BTE), y_BTE))


def _watch_attention(layer: LayerPass) -> dict[str, tuple[Tensor, Tensor]]:
    """Run a layer; return its attention's inputs and outputs (windows, tokens, hidden) by text: fp32, on the CPU."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in layer.hidden}
    outputs: dict[str, list[Tensor]] = {name: [] for name in layer.hidden}

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        inputs[layer.text].append((args[0] if args else kwargs["hidden_states"]).cpu().float())
        outputs[layer.text].append((output[0] if isinstance(output, tuple) else output).cpu().float())

    layer.run([("self_attn", watch)])
    return {name: (torch.cat(inputs[name]), torch.cat(outputs[name])) for name in inputs}
