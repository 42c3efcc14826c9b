"""Similarities of every layer's heads with those of the layers before it, from one pass.

Legend: H heads, T tokens.
"""

import torch
from torch import Tensor

from reattend.calibration.attention_calls import observed_attention
from reattend.calibration.layerwise import LayerPass
from reattend.convert.attention_sharing.following import Call
from reattend.convert.attention_sharing.formulas import head_similarity
from reattend.kernels.attention import Options
from reattend.kernels.attention.reference import scores

_WINDOWS = 4  # that similarities are measured on: maps take T^2 numbers per head


class Similarities:
    """Takes layers in order; keeps what the last `reach` of them attended with."""

    def __init__(self, reach: int) -> None:
        self._reach = reach
        self._calls: dict[int, list[Call]] = {}

    def measure(self, layer: LayerPass) -> dict[str, Tensor]:
        """Run a layer; return, by an earlier layer's number, (2, H, H) as `head_similarity`, a mean over windows."""
        calls: list[Call] = []

        def observe(query: Tensor, key: Tensor, value: Tensor, options: Options) -> None:
            if len(calls) < _WINDOWS:
                calls.append(Call(query.cpu().clone(), key.cpu().clone(), options))

        with observed_attention(layer.module, observe):
            layer.run()
        found = {
            str(leader): torch.stack([_similarity(*pair) for pair in zip(calls, earlier, strict=True)]).mean(0)
            for leader, earlier in self._calls.items()
        }
        self._calls[layer.index] = calls
        self._calls.pop(layer.index - self._reach, None)
        return found


def _similarity(ours: Call, theirs: Call) -> Tensor:
    return head_similarity(_weights(ours), _weights(theirs))


def _weights(call: Call) -> Tensor:
    found = scores(call.query.float(), call.key.float(), call.options, torch.float32)
    return torch.softmax(found, -1)[0]
