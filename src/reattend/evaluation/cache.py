"""What a running model's KV cache holds."""

from typing import Any

import torch

from reattend.errors import Failure
from reattend.evaluation.subject import Subject

_TOKENS = 64  # a short prompt: every token adds the same, until a sliding window is full


def cache_bytes_per_token(subject: Subject, ids: list[int]) -> float | None:
    """Return the bytes in the cache after the first tokens of a window, by token; None for an encoder.

    Counted in the tensors themselves: keys and values, or what an MLA layer keeps in their place, in the dtype
    that the model runs in. A buffer's room for later tokens is not counted. Raises `Failure` where the model
    returns no cache.
    """
    if not subject.predicts:
        return None
    prompt = torch.tensor([ids[:_TOKENS]])
    cache = getattr(subject.run(prompt), "cache", None)
    if cache is None:
        raise Failure(f"{subject.name}: {type(subject.model).__name__} returns no cache")
    return sum(map(_held, cache.layers)) / prompt.shape[1]


def _held(layer: Any) -> int:
    tensors = (getattr(layer, name, None) for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
