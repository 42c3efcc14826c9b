"""What leaders leave for their followers when a model's layers run one after another, all windows through each.

A model that shares attention hands one dict through its layers in each forward pass; here each window has one. It
lies on the CPU, and what no later layer follows is dropped.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_KEYWORD = "shared_attention"  # of the layers of portable models


class SharedAttention:
    """Queries and keys by leader, for each window of each text; `leaders` has each layer's, None for its own."""

    def __init__(self, leaders: Sequence[int | None] | None) -> None:
        self._leaders = leaders
        self._left: dict[Any, dict[int, Any]] = {}

    @contextmanager
    def of(self, layer: int, window: Any, device: torch.device) -> Iterator[dict[str, Any]]:
        """Give a layer's keyword arguments for a window; keep what it leaves for later layers."""
        if self._leaders is None:
            yield {}
            return
        given = to_device(self._left.get(window, {}), device)
        yield {_KEYWORD: given}
        awaited = awaited_after(layer, self._leaders)
        self._left[window] = {leader: to_device(left, "cpu") for leader, left in given.items() if leader in awaited}


def awaited_after(layer: int, leaders: Sequence[int | None]) -> set[int]:
    """Return the leaders that ran by the time that a layer has, and that later layers follow."""
    return {leader for leader in leaders[layer + 1 :] if leader is not None and leader <= layer}


def to_device(value: Any, device: str | torch.device) -> Any:
    """Move the tensors of nested tuples and dicts."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(to_device(item, device) for item in value)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    return value
