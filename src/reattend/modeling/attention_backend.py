"""Our attention under the names "reattend" and "reattend_int8" in transformers.

A name needs two functions: one for attention and one for masks. With the first alone transformers makes no mask, and
padded batches come out wrong without a word. Masks are ranges of keys where they can be, else sdpa's.
"""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from reattend.families.attention_kinds import INT8_FP16, declared_kinds
from reattend.kernels.attention import attention
from reattend.kernels.attention.call import NO_MATTER, is_causal_call, read_call
from reattend.kernels.attention.reference import visible
from reattend.kernels.attention_int8 import Backend, Quantization, attention_int8
from reattend.kernels.shared_decode import Row, follow, lead
from reattend.quantize.attention.kinds import HOW

_LOG = logging.getLogger(__name__)
EXACT, INT8, SIMULATED = "reattend", "reattend_int8", "reattend_int8_simulated"


def register_attention() -> None:
    """Make `attn_implementation="reattend"`, `"reattend_int8"` and `"reattend_int8_simulated"` known to transformers.

    `load()` calls it; call it before `from_pretrained(..., attn_implementation="reattend")`. Calling twice is fine.
    """
    for name, function in ((EXACT, attend), (INT8, attend_int8), (SIMULATED, attend_as_int8)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, attention_ranges)


def attention_ranges(
    batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int = 0, **rest: Any
) -> Tensor | None:
    """Return the mask of a forward pass in the form that `attend` reads.

    None means causal from the bottom right, or for one query all keys; int32 (B, 1, 1, 4) are `Options.ranges` and a
    window (0: none), with four dimensions because transformers takes two for a padding mask; anything else is what
    `sdpa_mask` returns: bool (B, 1, S, T).
    """
    edges = _edges(batch_size, kv_length, kv_offset, rest) if _has_ranges(q_length, rest) else None
    if edges is None:
        if q_length not in (1, kv_length):  # sdpa's None would be causal from the top left: an empty static cache
            rest["allow_is_causal_skip"] = False
        sizes = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length}
        made: Tensor | None = sdpa_mask(**sizes, q_offset=q_offset, kv_offset=kv_offset, **rest)
        return made
    window = int(rest.get("local_size") or 0)
    window = window if window < kv_length else 0  # some key is further away, or none is
    padded = rest.get("attention_mask") is not None
    if not (padded or window) and q_length == kv_length and isinstance(q_offset, int) and q_offset == kv_offset:
        return None
    numbers = [torch.as_tensor(n, dtype=torch.int32, device=edges.device) for n in (q_offset - kv_offset, window)]
    columns = [number.reshape(1, 1).expand(batch_size, 1) for number in numbers]
    mask = torch.cat([edges, *columns], 1)[:, None, None]
    mask.window = window  # type: ignore[attr-defined]  # saves its reader from asking a GPU
    return mask


def _has_ranges(q_length: int, rest: dict[str, Any]) -> bool:
    """Whether a mask is causal over a range of keys, and a kernel that reads ranges may run."""
    window, config = rest.get("local_size"), rest.get("config")
    if not rest.get("allow_is_causal_skip", True):  # something is laid over the mask, or the model edits it itself
        return False
    chunked = getattr(config, "attention_chunk_size", None) is not None
    # With a window the mask function is a closure that can't be told from others, but by the flag above.
    plain = rest.get("mask_function", causal_mask_function) is causal_mask_function
    if not plain and (not window or chunked):
        return False
    return not _is_traced() and not _takes_sdpa_masks(q_length, rest)


def _takes_sdpa_masks(q_length: int, rest: dict[str, Any]) -> bool:
    """Whether what will run is torch's sdpa, for which a mask that is made once serves all layers."""
    simulated = getattr(rest.get("config"), "_attn_implementation", None) == SIMULATED
    if simulated or torch.device(rest.get("device") or "cpu").type != "cpu":
        return False
    return q_length == 1 or rest.get("dtype") != torch.bfloat16


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def _edges(batch: int, tokens: int, kv_offset: int, rest: dict[str, Any]) -> Tensor | None:
    """Return the first key and the end of keys (B, 2), as padding says; None where a row has holes."""
    padding = rest.get("attention_mask")
    if padding is None:
        whole = torch.tensor([0, tokens], dtype=torch.int32, device=torch.device(rest.get("device") or "cpu"))
        return whole.expand(batch, 2)
    seen_BT = padding[:, kv_offset : kv_offset + tokens].bool()
    seen_BT = nn.functional.pad(seen_BT, (0, tokens - seen_BT.shape[1]))
    count_B = seen_BT.sum(1)
    first_B = seen_BT.int().argmax(1)
    starts_B = (seen_BT[:, 1:] & ~seen_BT[:, :-1]).sum(1) + seen_BT[:, 0]
    if bool((starts_B > 1).any()):
        return None
    return torch.stack([first_B, first_B + count_B], 1).to(torch.int32)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None, **more: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention as transformers calls it: query (B, H, S, D), key (B, G, T, D), value (B, G, T, V).

    Returns the output (B, S, H, V) and no weights. `softcap`, `s_aux` (sinks), `gamma` and `zeta` (clipped
    softmax) are computed, a sliding window is part of the mask; dropout
    and additive masks run through sdpa, said once in the log. A keyword that would change the result and is not
    known raises `ValueError`; one that is merely unknown is named once in the log. `shared_row`, a dict, is where a
    leader's single query leaves its scores, and its followers find them.
    """
    row = more.pop("shared_row", None)
    if row is not None:
        shared = _decode_shared(query, key, value, attention_mask, scaling, row, more)
        if shared is not None:
            return shared, None
    if _is_single(query, attention_mask, more):
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **more
        )
    options = read_call(attention_mask, scaling, is_causal_call(module, is_causal), more)
    stock = _stock_reason(attention_mask, dropout)
    if stock is not None:
        if options.sinks is not None or options.softcap is not None or options.is_clipped:
            raise ValueError(f"attention 'reattend': sinks, soft caps and clipping are not computed with {stock}")
        _log_once(f"sdpa, because of {stock}")
        seen = attention_mask if options.ranges is None else visible(options, key, query.shape[2])
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, seen, dropout, scaling, is_causal, **more
        )
    with _one_dtype(query, key, value) as tensors:
        return attention(*tensors, options).transpose(1, 2).contiguous(), None


def _decode_shared(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, row: dict[str, Row],
    more: dict[str, Any],
) -> Tensor | None:  # fmt: skip
    """Decode a layer that leads, or follows what its leader left in `row`; None where the call is another one."""
    if "row" in row:
        return follow(row["row"], value).transpose(1, 2).contiguous()
    plain = all(other is None or name in NO_MATTER for name, other in more.items())
    if query.shape[2] > 1 or not plain or (mask is not None and mask.dtype != torch.bool):
        return None
    if _is_traced() or (torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))):
        return None
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    output, row["row"] = lead(query, key, value, scale=scale, mask=mask)
    return output.transpose(1, 2).contiguous()


@contextmanager
def _one_dtype(*tensors: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Do what autocast does before sdpa: cast once; within, nothing is cast."""
    device = tensors[0].device.type
    query, key, value = tensors
    if torch.is_autocast_enabled(device):
        query, key, value = (tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)
    with torch.autocast(device, enabled=False):
        yield query, key, value


def attend_int8(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """Quantised attention in the layers that the config names for it, all where it names none; else `attend`."""
    return _int8("auto", module, (query, key, value), attention_mask, more)


def attend_as_int8(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """`attend_int8` by its reference, so that a CPU can measure what a GPU will compute; single queries are exact."""
    backend: Backend = "auto" if query.shape[2] == 1 else "reference"
    return _int8(backend, module, (query, key, value), attention_mask, more)


def _int8(
    backend: Backend,
    module: nn.Module,
    tensors: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    more: dict[str, Any],
) -> tuple[Tensor, None]:
    how, rest = _quantization(module), dict(more)
    if rest.pop("shared_row", None) is not None and tensors[0].shape[2] == 1:
        return attend(module, *tensors, mask, **more)  # exact, as single queries are: a leader's row serves all
    dropout, scaling, is_causal = (rest.pop(name, None) for name in ("dropout", "scaling", "is_causal"))
    if how is None or _stock_reason(mask, dropout or 0.0) is not None:
        return attend(module, *tensors, mask, **more)
    options = read_call(mask, scaling, is_causal_call(module, is_causal), rest)
    if options.softcap is not None or options.mask is not None or options.is_clipped:
        _log_once("exact, because soft caps, clipping and masks other than ranges of keys are not quantised")
        return attend(module, *tensors, mask, **more)
    with _one_dtype(*tensors) as cast:
        return attention_int8(*cast, options, how, backend=backend).transpose(1, 2).contiguous(), None


def _quantization(module: nn.Module) -> Quantization | None:
    """Return how a layer's attention is quantised; None: it is exact, as is what a declaration does not cover."""
    config: Any = getattr(module, "config", None)
    kinds = None if config is None else declared_kinds(vars(config), getattr(config, "num_hidden_layers", 0))
    index = getattr(module, "layer_idx", None)
    if kinds is None:
        return HOW[INT8_FP16]
    return HOW.get(kinds[index]) if isinstance(index, int) and index < len(kinds) else None


def _is_single(query: Tensor, mask: Tensor | None, more: dict[str, Any]) -> bool:
    """Whether this is plain decode on a CPU, where sdpa would run: reading the call costs a percent."""
    if query.shape[2] > 1 or query.device.type != "cpu" or (mask is not None and mask.dtype == torch.int32):
        return False
    return all(value is None or name in NO_MATTER for name, value in more.items())


def _stock_reason(mask: Tensor | None, dropout: float) -> str | None:
    if dropout:
        return "dropout"
    return "an additive mask" if mask is not None and mask.is_floating_point() else None


def seen_by(mask: Tensor | None, key: Tensor, queries: int) -> Tensor | None:
    """Return a mask of `attention_ranges` as bool (B, 1, S, T); `key` is (B, G, T, D)."""
    if mask is None or mask.dtype != torch.int32:
        return mask
    return visible(read_call(mask, None, True, {}), key, queries)


@functools.cache
def _log_once(what: str) -> None:
    _LOG.warning("attention: %s", what)
