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
     "num_items_in_batch", "output_hidden_states", "sliding_window", "output_router_logits", "is_training",
     "position_embeddings")
)  # fmt: skip
# These change the result, and nothing here computes them.
_REFUSED = ("position_bias", "head_mask", "cu_seq_lens_q", "cu_seq_lens_k", "block_table", "indices")


def is_causal_call(module: nn.Module, is_causal: bool | None) -> bool:
    """Return whether a call without a mask is causal: what it says itself, else what its module says."""
    return bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal


def read_call(mask: Tensor | None, scaling: float | None, causal: bool, more: Mapping[str, Any]) -> Options:
    """Return what a call asks for.

    `mask` is None (then `causal` says), int32 (B, 1, 1, 4), which are `Options.ranges` of causal attention and its
    window (0: none), or bool, broadcast to (B, H, S, T), which is all that counts. Of `more`, `softcap`, `s_aux`,
    `gamma` and `zeta` (of clipped softmax) are read; a `sliding_window` is in the mask already, or of no effect, as
    with sdpa. Raises `ValueError` for what nothing here computes; a keyword that is merely unknown is named once in
    the log.
    """
    given = {name: value for name, value in more.items() if value is not None and value is not False}
    for name in _REFUSED:
        if name in given:
            raise ValueError(f"attention 'reattend' does not know {name!r}; use attn_implementation='sdpa'")
    softcap, sinks, gamma = (given.pop(name, None) for name in ("softcap", "s_aux", "gamma"))
    how: dict[str, Any] = {"softcap": softcap, "sinks": sinks, "gamma": gamma, "zeta": given.pop("zeta", 1.0)}
    for name in sorted(given.keys() - NO_MATTER):
        _log_once(name)
    if mask is None:
        return Options(causal, scaling, **how)
    if mask.dtype == torch.int32:
        window = getattr(mask, "window", None)
        window = int(mask[0, 0, 0, 3]) if window is None else window
        return Options(True, scaling, window or None, ranges=mask[:, 0, 0, :3], **how)
    return Options(False, scaling, mask=mask, **how)


@functools.cache
def _log_once(name: str) -> None:
    _LOG.warning("attention 'reattend' takes no notice of %r", name)
