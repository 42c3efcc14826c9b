"""Second moments of activations, streamed in fp64: no activation is stored.

Legend: N rows (tokens), C channels.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from reattend.calibration.layerwise import Hook, LayerPass
from reattend.errors import Failure


@dataclass(frozen=True)
class Point:
    """A place inside a layer: what a submodule such as `self_attn.k_proj` takes in or gives out."""

    module: str
    side: Literal["input", "output"] = "input"


class Moments:
    """Sums over rows: count, sum of x, sum of x xᵀ, largest |x| per channel."""

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.total = torch.zeros(channels, dtype=torch.float64, device=device)
        self.second = torch.zeros(channels, channels, dtype=torch.float64, device=device)
        self.absmax = torch.zeros(channels, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """Add rows: `x` (..., C) in any float dtype."""
        x_NC = x.reshape(-1, x.shape[-1]).double()
        self.count += len(x_NC)
        self.total += x_NC.sum(0)
        self.second.addmm_(x_NC.T, x_NC)
        self.absmax = torch.maximum(self.absmax, x_NC.abs().amax(0))

    def tensors(self) -> dict[str, Tensor]:
        """Return `count` (), `mean` (C), `second` (C, C) = E[x xᵀ] and `absmax` (C), fp64 on the CPU."""
        if not self.count:
            raise Failure("no activations reached the point: is the module used?")
        found = {"mean": self.total / self.count, "second": self.second / self.count, "absmax": self.absmax}
        if not all(bool(torch.isfinite(value).all()) for value in found.values()):
            raise Failure("activations hold NaN or inf")
        return {"count": torch.tensor(self.count), **{name: value.cpu() for name, value in found.items()}}


def layer_moments(layer: LayerPass, points: Iterable[Point]) -> dict[Point, dict[str, Tensor]]:
    """Run a layer on all windows of all its texts and return `Moments.tensors` at each point."""
    found: dict[Point, Moments] = {}
    layer.run([(point.module, _hook(point, found)) for point in points])
    moments = {}
    for point in points:
        try:
            moments[point] = found[point].tensors()
        except (KeyError, Failure) as error:
            raise Failure(f"layer {layer.index}, {point.module} {point.side}: no finite activations") from error
    return moments


def _hook(point: Point, found: dict[Point, Moments]) -> Hook:
    def watch(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        x = inputs[0] if point.side == "input" else output
        if point not in found:
            found[point] = Moments(x.shape[-1], x.device)
        found[point].add(x)

    return watch
