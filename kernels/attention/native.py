"""The compiled CPU route: `native.c`, bf16 on AVX512 BF16. Torch's own kernel is a fifth as fast there."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from reattend.kernels import compiled
from reattend.kernels.attention.options import Options

_SOURCE = Path(__file__).with_name("native.c")
# Keys and values are packed for a block of 48 queries: with fewer rows per key head that is a waste.
_FEW_ROWS = 48
_MOST_STRIDE = 1 << 26  # numbers between tokens, so that 16 of them are in reach of an int32


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "lse", "ranges", "sinks")),
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "heads", "groups", "queries", "tokens", "width", "values")
        ),
        *((f"{tensor}_{i}", ctypes.c_int64) for tensor in "qkvo" for i in range(3)),
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("causal", "threads")),
    )  # fmt: skip


@functools.cache
def unavailable() -> str | None:
    """Return why this host can't run the compiled route, or None; compiles on the first call."""
    missing = compiled.unavailable(_SOURCE)
    if missing or compiled.library(_SOURCE).reattend_has_bf16():
        return missing
    return "the CPU has no AVX512 BF16, or the C compiler doesn't know it"


def unfit(query: Tensor, key: Tensor, value: Tensor, options: Options) -> str | None:
    """Return why this call can't go the compiled route, or None."""
    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        return f"tensors are {query.dtype} on {query.device}, not torch.bfloat16 on cpu"
    if options.softcap or options.slopes is not None or options.mask is not None or options.is_clipped:
        return "the compiled kernel has no softcap, slopes, clipped softmax or mask"
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (query, key, value, options.sinks)
    ):
        return "the compiled kernel has no gradients"
    if query.shape[2] * query.shape[1] < _FEW_ROWS * key.shape[1]:
        return f"fewer than {_FEW_ROWS} queries per key head are quicker in torch"
    if query.shape[3] % 2 or key.stride(2) > _MOST_STRIDE:
        return "the head dim is odd, or keys lie too far apart"
    return unavailable()


def attention(
    query: Tensor, key: Tensor, value: Tensor, options: Options, *, lse: bool
) -> tuple[Tensor, Tensor | None]:
    """See `attention` of the package."""
    q, k, v = (tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in (query, key, value))
    batch, heads, queries, width = q.shape
    groups, tokens, values = k.shape[1], k.shape[2], v.shape[3]
    # What reads it wants (B, S, H, V): then nothing has to be copied.
    out = torch.empty(batch, queries, heads, values, dtype=q.dtype, device=q.device).transpose(1, 2)
    sums = torch.empty(batch, heads, queries, device=q.device) if lse else None
    ranges = options.ranges_for(key, queries).contiguous()
    sinks = None if options.sinks is None else options.sinks.detach().float().contiguous()
    call = _Attention(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(),
        None if sums is None else sums.data_ptr(), ranges.data_ptr(), None if sinks is None else sinks.data_ptr(),
        batch, heads, groups, queries, tokens, width, values,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        options.window or 0, options.scale_for(width), options.causal, torch.get_num_threads(),
    )  # fmt: skip
    if compiled.library(_SOURCE).reattend_attention(ctypes.byref(call)):
        raise MemoryError("attention: no memory for the scratch of one call")
    return out, sums
