"""The converted layers so far, run beside the source's: each next layer is fitted to what reaches it in the output.

Fitted to the source's inputs instead, layers don't know of each other's errors, which add up (docs/experiments.md).

Legend: W windows, T tokens, E hidden.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from reattend.calibration.attention_calls import replaced_forward
from reattend.calibration.layerwise import LayerPass
from reattend.convert.mla.attention import LatentAttention, SourceAttention


class Prefix:
    """The hidden states (W, T, E) of every text as the converted layers so far leave them."""

    def __init__(self, hidden: Mapping[str, Tensor]) -> None:
        self.states = {text: states.clone() for text, states in hidden.items()}

    def inputs(self, layer: LayerPass) -> dict[str, Tensor]:
        """Return what the layer's attention would read, by text: fp32, on the CPU."""
        norm = layer.module.get_submodule("input_layernorm")
        with torch.inference_mode():
            return {
                text: torch.cat([norm(one[None].to(layer.device)).cpu().float() for one in states])
                for text, states in self.states.items()
            }

    def missing(self, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return by how much the states fall short of the source's, `before` the layer (W, T, E); fp32."""
        return {text: (before[text] - states).float() for text, states in self.states.items()}

    def advance(self, layer: LayerPass, attention: LatentAttention) -> None:
        """Put the states through the layer, with this attention in the place of its own."""
        for states in self.states.values():
            run_converted(layer, attention, states)


def run_converted(layer: LayerPass, attention: LatentAttention, states: Tensor) -> None:
    """Replace `states` (W, T, E) by the layer's outputs with this attention instead of its own."""
    single = attention.to(torch.float32)

    def attend(hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return single.attend(hidden_states.cpu().float()).to(hidden_states.device, hidden_states.dtype), None

    with replaced_forward(layer.module.get_submodule("self_attn"), attend), torch.inference_mode():
        for i in range(len(states)):
            states[i : i + 1].copy_(layer.call(states[i : i + 1]))


def stored_attention(attention: LatentAttention) -> dict[str, Tensor]:
    """Return a layer's tensors, to be kept with the statistics: an interrupted run needs its prefix again; fp32."""
    return attention.to(torch.float32).tensors()


def read_attention(stored: Mapping[str, Tensor], source: SourceAttention, pair_P: Tensor) -> LatentAttention:
    """Undo `stored_attention` of a layer made from `source`; `pair_P` are its pairs, as indices into the source's."""
    rotary = source.rotary
    return LatentAttention(
        **stored, rotary=rotary.pick(pair_P), scale=source.scale * rotary.factor**2, window=source.window,
        inputs=None if source.q_norm_D is None else source.to(torch.float32),
    )  # fmt: skip
