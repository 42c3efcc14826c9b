"""The cache of an MLA layer: latent and rotary rows in buffers with room, so that a new token copies one row.

Legend: B batch, T tokens, L latent rank, R rotary numbers.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

_ROOM = 256  # rows that a full buffer grows by: what a layer holds too much is below this


class LatentLayer(DynamicLayer):  # type: ignore[misc]
    """A `DynamicLayer` whose `keys` (B, 1, T, L) and `values` (B, 1, T, R) are the filled part of larger buffers.

    `keys` and `values` stay what the base class works on (crop, beams, batch changes). Where such a change left
    tensors that are no part of the buffers, the next update copies them into new ones.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._latent: Tensor | None = None
        self._rope: Tensor | None = None

    @classmethod
    def over(cls, layer: DynamicLayer) -> "LatentLayer":
        """Return a layer that holds what `layer` holds."""
        own = cls()
        own.__dict__.update(layer.__dict__)
        return own

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append rows (B, 1, S, L) and (B, 1, S, R); return all, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._latent, self.keys = _append(self._latent, self.keys, key_states)
        self._rope, self.values = _append(self._rope, self.values, value_states)
        return self.keys, self.values

    def reset(self) -> None:
        """Drop what is held, and the buffers."""
        super().reset()
        self._latent = self._rope = None


def latent_layer(cache: Cache | None, index: int) -> LatentLayer | None:
    """Return a cache's layer for an MLA layer, made out of a plain growing one; None for every other kind.

    Offloaded caches keep their layers: these move their tensors at every step.
    """
    if not isinstance(cache, DynamicCache) or cache.offloading:
        return None
    if index >= len(cache.layers):
        if cache.layer_class_to_replicate is not DynamicLayer:
            return None
        cache.layers.extend(LatentLayer() for _ in range(len(cache.layers), index + 1))
    layer = cache.layers[index]
    if type(layer) is DynamicLayer:
        layer = cache.layers[index] = LatentLayer.over(layer)
    return layer if isinstance(layer, LatentLayer) else None


def rows_held(cache: Cache | None, index: int) -> int | None:
    """Return the rows that a cache holds for an MLA layer, whole or of a window; None for every other kind.

    Layers that hold a window stay transformers' own: they copy a window per token, no more.
    """
    layers = cache.layers if isinstance(cache, DynamicCache) and not cache.offloading else []
    if index < len(layers) and type(layers[index]) is DynamicSlidingWindowLayer:
        held = layers[index].keys
        return held.shape[-2] if held is not None and held.numel() else 0
    layer = latent_layer(cache, index)
    return None if layer is None else int(layer.get_seq_length())


def _append(buffer: Tensor | None, held: Tensor, new: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return the buffer, grown where it has no room, and its filled part with `new` at the end."""
    start = held.shape[-2] if held.numel() else 0
    if torch.is_grad_enabled() and (new.requires_grad or held.requires_grad):
        # A row written in place would change what the backward pass of an earlier step still needs.
        return None, torch.cat([held, new], -2) if start else new
    end = start + new.shape[-2]
    if buffer is None or not _is_start_of(held, buffer) or end > buffer.shape[-2]:
        buffer = new.new_empty((*new.shape[:-2], end + _ROOM, new.shape[-1]))
        if start:
            buffer[..., :start, :] = held
    buffer[..., start:end, :] = new
    return buffer, buffer[..., :end, :]


def _is_start_of(held: Tensor, buffer: Tensor) -> bool:
    """Whether `held` is the filled part of `buffer`, and may be written to."""
    same = held.data_ptr() == buffer.data_ptr() and held.stride() == buffer.stride()
    fits = held.shape[:-2] == buffer.shape[:-2]
    return same and fits and (torch.is_inference_mode_enabled() or not buffer.is_inference())
