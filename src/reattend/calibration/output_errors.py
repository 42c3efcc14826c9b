"""What changes within a layer, one at a time, put wrong in its output."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from reattend.calibration.layerwise import LayerPass


def output_errors(
    layer: LayerPass, text: str, changes: Mapping[str, Callable[[], AbstractContextManager[Any]]]
) -> dict[str, float]:
    """Return the relative squared error of the layer's output under each change alone, a mean over a text's tokens.

    A change holds while the context that it makes is open. The output is the residual stream: what a change adds to
    it counts against all that is there.
    """
    states = layer.hidden[text]
    sums = dict.fromkeys(changes, 0.0)
    with torch.inference_mode():
        for i in range(len(states)):
            want = layer.call(states[i : i + 1]).float()
            energy = want.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)  # a padding row may be zero
            for name, change in changes.items():
                with change():
                    got = layer.call(states[i : i + 1]).float()
                sums[name] += float(((got - want).square().sum(-1) / energy).mean())
    return {name: total / len(states) for name, total in sums.items()}
