"""A call of an attention function by a transformers model, as `Options`."""

import functools
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reattend.kernels.attention.options import Options

_LOG = logging.getLogger(__name__)
# Passed along by models, and without a meaning for attention once the mask is made.
NO_MATTER = frozenset(
    ("position_ids", "cache_position", "use_cache", "cache", "past_key_values", "return_dict", "logits_to_keep",
     "num_items_in_batch", "output_hidden_states", "output_router_logits", "is_training", "position_embeddings")
)  # fmt: skip
# These change the result, and nothing here computes them.
_REFUSED = ("position_bias", "head_mask", "cu_seq_lens_q", "cu_seq_lens_k", "block_table", "indices")


def is_causal_call(module: nn.Module, is_causal: bool | None) -> bool:
    """Return whether a call without a mask is causal: what it says itself, else what its module says."""
    return bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal


def read_call(mask: Tensor | None, scaling: float | None, causal: bool, more: Mapping[str, Any]) -> Options:
    """Return what a call asks for.

    `mask` is None (then `causal` says), int32 (B, 1, 1, 3), which are `Options.ranges` of causal attention, or bool
    (B, 1 or H, S, T), which is all that counts. Of `more`, `softcap`, `sliding_window` and `s_aux` are read. Raises
    `ValueError` for what nothing here computes; a keyword that is merely unknown is named once in the log.
    """
    given = {name: value for name, value in more.items() if value is not None and value is not False}
    for name in _REFUSED:
        if name in given:
            raise ValueError(f"attention 'reattend' does not know {name!r}; use attn_implementation='sdpa'")
    window, softcap, sinks = (given.pop(name, None) for name in ("sliding_window", "softcap", "s_aux"))
    for name in sorted(given.keys() - NO_MATTER):
        _log_once(name)
    if mask is None:
        return Options(causal, scaling, window if causal else None, softcap, sinks=sinks)
    if mask.dtype == torch.int32:
        return Options(True, scaling, window, softcap, ranges=mask[:, 0, 0], sinks=sinks)
    return Options(False, scaling, None, softcap, mask=mask, sinks=sinks)


@functools.cache
def _log_once(name: str) -> None:
    _LOG.warning("attention 'reattend' takes no notice of %r", name)
