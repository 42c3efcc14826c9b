"""Second moments of what the projections of attention read, and how much their errors weigh in the layer's output.

Legend: W windows, T tokens, N inputs, H query heads, G key heads.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from reattend.calibration.attention_calls import observed_attention
from reattend.calibration.layerwise import LayerPass
from reattend.calibration.output_errors import output_errors
from reattend.convert.dictionary.formulas import low_rank, root
from reattend.errors import BadNumbersError
from reattend.kernels.attention import Options
from reattend.kernels.attention.reference import scores

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_TEXT = "selection"


def gather_moments(layer: LayerPass) -> dict[str, Tensor]:
    """Run a layer; return E[x x^T] of what `q_proj` and `o_proj` read, fp64, and of what keys and values come from.

    `input` counts tokens alike; `attended` by the attention that they receive, a mean over heads: a key or a value
    that most rows look at, such as the first, is one token in thousands otherwise. `output` is what o_proj reads.
    """
    sums: dict[str, Tensor] = {}
    read: list[Tensor] = []
    count = 0

    def add(name: str, left_TN: Tensor, right_TN: Tensor) -> None:
        found = (left_TN.T @ right_TN).double().cpu()
        sums[name] = found if name not in sums else sums[name].add_(found)

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal count
        read[:] = [args[0].reshape(-1, args[0].shape[-1]).float()]
        count += len(read[0])
        add("input", read[0], read[0])

    def observe(query: Tensor, key: Tensor, value: Tensor, options: Options) -> None:
        mass_T = attention_received(query, key, options).to(read[0].device)
        add("attended", read[0] * mass_T[:, None], read[0])

    def put_out(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x_TN = args[0].reshape(-1, args[0].shape[-1]).float()
        add("output", x_TN, x_TN)

    with observed_attention(layer.module, observe):
        layer.run([("self_attn.q_proj", keep), ("self_attn.o_proj", put_out)])
    found = {name: total / count for name, total in sums.items()}
    if not all(bool(torch.isfinite(second).all()) for second in found.values()):
        raise layer.bad_numbers("input of self_attn")
    return found


def attention_received(query_1HTD: Tensor, key_1GTD: Tensor, options: Options) -> Tensor:
    """Return the attention that each token receives from all rows (T,), a mean over heads: T in all."""
    groups = key_1GTD.shape[1]
    per = query_1HTD.shape[1] // groups
    total = torch.zeros(key_1GTD.shape[2], device=key_1GTD.device)
    for group in range(groups):  # one key head at a time, for the memory
        query = query_1HTD[:, group * per : (group + 1) * per]
        weight = torch.softmax(scores(query, key_1GTD[:, group : group + 1], options, torch.float32), -1)
        total += weight.sum((0, 1, 2))
    return total / query_1HTD.shape[1]


def second_of(name: str, moments: dict[str, Tensor]) -> Tensor:
    """Return the second moment that a projection's errors count by: keys and values half by attention received."""
    if name == "o_proj":
        return moments["output"]
    if name == "q_proj":
        return moments["input"]
    return (moments["input"] + moments["attended"]) / 2


def sensitivities(layer: LayerPass, moments: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return, per projection, what a unit of its expected square error puts wrong in the layer's output.

    Measured: each alone at half its useful rank, on the selection text; the mean over tokens of the output's squared
    difference over its square, as layers add to one stream.
    """
    changes, expected = {}, {}
    for name, own in weights_of(layer).items():
        weight, factor = layer.module.get_parameter(f"self_attn.{name}.weight"), root(second_of(name, moments))
        up, down = low_rank(own, factor, max(1, own.numel() // sum(own.shape) // 2))
        expected[name] = float(((own - up @ down) @ factor).square().sum())
        changes[name] = partial(_standing_in, weight, (up @ down).to(weight.device, weight.dtype))
    measured = output_errors(layer, _TEXT, changes)
    if not all(value < float("inf") for value in measured.values()):
        raise BadNumbersError(f"layer {layer.index}: its outputs hold NaN or inf")
    return {
        name: torch.tensor(error / max(expected[name], 1e-300), dtype=torch.float64)
        for name, error in measured.items()
    }


@contextmanager
def _standing_in(weight: nn.Parameter, other: Tensor) -> Iterator[None]:
    own = weight.data
    weight.data = other
    try:
        yield
    finally:
        weight.data = own


def weights_of(layer: LayerPass) -> dict[str, Tensor]:
    """Return a layer's projections, fp64 on the CPU."""
    return {
        name: layer.module.get_parameter(f"self_attn.{name}.weight").detach().cpu().double() for name in PROJECTIONS
    }
