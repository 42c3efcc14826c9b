"""Similarities of every layer's heads with those of the layers before it, from one pass.

Legend: H heads, T tokens.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from reattend.calibration.attention_calls import observed_attention
from reattend.calibration.layerwise import LayerPass
from reattend.convert.attention_sharing.following import Call
from reattend.convert.attention_sharing.formulas import head_similarity
from reattend.kernels.attention import Options
from reattend.kernels.attention.reference import scores

WINDOWS = 4  # that similarities are measured on: maps take T^2 numbers per head


class Similarities:
    """Takes layers in order; keeps what the `leaders` that each may follow attended with."""

    def __init__(self, leaders: Mapping[int, Sequence[int]]) -> None:
        self._leaders = leaders
        self._calls: dict[int, list[Call]] = {}

    def take(self, layer: LayerPass) -> None:
        """Run a layer."""
        calls: list[Call] = []

        def observe(query: Tensor, key: Tensor, value: Tensor, options: Options) -> None:
            calls.append(Call(query.cpu().clone(), key.cpu().clone(), options))

        with observed_attention(layer.module, observe):
            layer.run()
        later = {leader for follower, row in self._leaders.items() if follower >= layer.index for leader in row}
        self._calls = {index: kept for index, kept in self._calls.items() if index in later} | {layer.index: calls}

    def measure(self, layer: int) -> dict[str, Tensor]:
        """Return, by leader, (2, H, H) as `head_similarity`, a mean over windows, for the layer taken last."""
        return {
            str(leader): torch.stack(
                [_similarity(*pair) for pair in zip(self._calls[layer], self._calls[leader], strict=True)]
            ).mean(0)
            for leader in self._leaders.get(layer, ())
        }


def _similarity(ours: Call, theirs: Call) -> Tensor:
    return head_similarity(_weights(ours), _weights(theirs))


def _weights(call: Call) -> Tensor:
    found = scores(call.query.float(), call.key.float(), call.options, torch.float32)
    return torch.softmax(found, -1)[0]
