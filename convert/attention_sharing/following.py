"""A layer that attends with another's queries and keys, while calibration runs: the source's layer in its place.

Legend: W windows, T tokens, E hidden, H query heads, G key heads, D head dim.
"""

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from reattend.calibration.attention_calls import observed_attention, replaced_forward
from reattend.calibration.layerwise import LayerPass
from reattend.convert.attention_sharing.formulas import fold
from reattend.kernels.attention import Options, attention

MODULE = "self_attn"


@dataclass(frozen=True)
class Call:
    """What a layer attended with in one window: queries (1, H, T, D) and keys (1, G, T, D) after norms and RoPE."""

    query: Tensor
    key: Tensor
    options: Options


@dataclass(frozen=True)
class Follower:
    """The projections that a follower keeps: value (G, D, E) and (G, D) or None, output (E, H, D) and (E) or None."""

    value_GDE: Tensor
    value_bias_GD: Tensor | None
    output_EHD: Tensor
    output_bias_E: Tensor | None

    def folded(self, map_H: Tensor) -> "Follower":
        """Return the same with heads in the order of the leader's heads that they follow."""
        values, outputs = fold(self.value_GDE, self.output_EHD, map_H)
        bias = None if self.value_bias_GD is None else fold(self.value_bias_GD, self.output_EHD, map_H)[0]
        return replace(self, value_GDE=values, value_bias_GD=bias, output_EHD=outputs)

    def mix(self, x_1TE: Tensor, call: Call) -> Tensor:
        """Return what the heads find (T, H D), given what attention reads."""
        value_1GTD = torch.einsum("bte,gde->bgtd", x_1TE, self.value_GDE)
        if self.value_bias_GD is not None:
            value_1GTD = value_1GTD + self.value_bias_GD[:, None]
        query, key = (part.to(x_1TE.dtype) for part in (call.query, call.key))
        found_1HTD = attention(query, key, value_1GTD, call.options, backend="torch")
        return found_1HTD[0].transpose(0, 1).flatten(1)

    def put_out(self, mixed_TZ: Tensor) -> Tensor:
        """Return the output (T, E) for what the heads found."""
        return torch.nn.functional.linear(mixed_TZ, self.output_EHD.flatten(1), self.output_bias_E)

    def tensors(self) -> dict[str, Tensor]:
        """Return the projections as they are stored, by name within the attention module."""
        named = {
            "v_proj.weight": self.value_GDE.flatten(0, 1), "o_proj.weight": self.output_EHD.flatten(1),
            "v_proj.bias": None if self.value_bias_GD is None else self.value_bias_GD.flatten(),
            "o_proj.bias": self.output_bias_E,
        }  # fmt: skip
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def read_follower(tensors: Mapping[str, Tensor], groups: int) -> Follower:
    """Undo `Follower.tensors` for `groups` key heads; other tensors are left alone."""
    weight_VE, bias_V = tensors["v_proj.weight"], tensors.get("v_proj.bias")
    output_EZ = tensors["o_proj.weight"]
    width = len(weight_VE) // groups
    return Follower(
        weight_VE.view(groups, width, -1),
        None if bias_V is None else bias_V.view(groups, width),
        output_EZ.view(len(output_EZ), -1, width),
        tensors.get("o_proj.bias"),
    )


def own_follower(layer: LayerPass, groups: int) -> Follower:
    """Return a layer's own projections as a follower's, fp32 on the CPU."""
    named = layer.module.get_submodule(MODULE).state_dict()
    return read_follower({name: tensor.detach().cpu().float() for name, tensor in named.items()}, groups)


def forget(calls: MutableMapping[int, Any], leaders: Mapping[int, int], index: int) -> None:
    """Drop from `calls`, by leader, what no follower behind the layer `index` needs."""
    for leader in [*calls]:
        if max(layer for layer, other in leaders.items() if other == leader) <= index:
            del calls[leader]


def run_leading(layer: LayerPass, states_WTE: Tensor) -> list[Call]:
    """Replace states by the layer's outputs; return what it attended with, by window, on the CPU."""
    calls: list[Call] = []

    def observe(query: Tensor, key: Tensor, value: Tensor, options: Options) -> None:
        calls.append(Call(query.cpu().clone(), key.cpu().clone(), options))

    with observed_attention(layer.module, observe):
        _run(layer, states_WTE)
    return calls


def run_following(layer: LayerPass, states_WTE: Tensor, follower: Follower, calls: list[Call]) -> None:
    """Replace states by the layer's outputs with a follower in the place of its attention."""
    _run(layer, states_WTE, lambda window, x_1TE: follower.put_out(follower.mix(x_1TE, calls[window]))[None])


def run_dropped(layer: LayerPass, states_WTE: Tensor) -> None:
    """Replace states by the layer's outputs without attention."""
    _run(layer, states_WTE, lambda window, x_1TE: torch.zeros_like(x_1TE))


def run_plainly(layer: LayerPass, states_WTE: Tensor) -> None:
    """Replace states by the layer's outputs."""
    _run(layer, states_WTE)


def _run(layer: LayerPass, states_WTE: Tensor, attend: Callable[[int, Tensor], Tensor] | None = None) -> None:
    module: nn.Module = layer.module.get_submodule(MODULE)
    window = 0

    def instead(hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        assert attend is not None
        found = attend(window, hidden_states.cpu().float())
        return found.to(hidden_states.device, hidden_states.dtype), None

    with replaced_forward(module, module.forward if attend is None else instead), torch.no_grad():
        for window in range(len(states_WTE)):  # read by `instead`
            states_WTE[window : window + 1].copy_(layer.call(states_WTE[window : window + 1]))
