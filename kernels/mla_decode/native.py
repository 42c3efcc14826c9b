"""The compiled CPU route: `native.c`, fp32. Torch's products read the rows twice, and their rows are too few for it.

Legend: B batch, H heads, S queries, T cached tokens, L latent rank, R rotary numbers.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from reattend.kernels import compiled

_SOURCE = Path(__file__).with_name("native.c")
_TILE = 64  # tokens, as in native.c
# Below this many numbers of the cache a second thread costs more than it saves.
_THREAD_NUMBERS = 1 << 16


class _Decode(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "qr", "latent", "rope", "mask", "out")),
        *((name, ctypes.c_int64) for name in ("batch", "rows", "queries", "tokens", "rank", "width")),
        *(
            (name, ctypes.c_int64)
            for name in ("latent_b", "latent_t", "rope_b", "rope_t", "mask_b", "mask_s", "mask_t")
        ),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("parts", "threads")),
    )


def unavailable() -> str | None:
    """Return why this host can't run the compiled route, or None; compiles on the first call."""
    return compiled.unavailable(_SOURCE)


def unfit(rank: int, width: int) -> str | None:
    """Return why rows of these widths can't go the compiled route, or None."""
    return None if rank % 32 == 0 and width % 8 == 0 else "the rank is no multiple of 32, or the rope width of 8"


def mla_decode(
    query_latent_BHSL: Tensor, query_rope_BHSR: Tensor, latent_BTL: Tensor, rope_BTR: Tensor, scale: float,
    mask: Tensor | None,
) -> Tensor:  # fmt: skip
    """See `mla_decode` of the package; fp32, `mask` bool."""
    q, qr = query_latent_BHSL.contiguous(), query_rope_BHSR.contiguous()
    batch, heads, queries, rank = q.shape
    tokens, width = rope_BTR.shape[1:]
    out = torch.empty_like(q)
    seen = None if mask is None else mask.expand(batch, 1, queries, tokens)
    threads = torch.get_num_threads() if batch * tokens * (rank + width) >= _THREAD_NUMBERS else 1
    parts = max(1, min(-(-threads // batch), tokens // _TILE))
    call = _Decode(
        q.data_ptr(), qr.data_ptr(), latent_BTL.data_ptr(), rope_BTR.data_ptr(),
        None if seen is None else seen.data_ptr(), out.data_ptr(),
        batch, heads * queries, queries, tokens, rank, width,
        *latent_BTL.stride()[:2], *rope_BTR.stride()[:2],
        *((0, 0, 0) if seen is None else (seen.stride(0), seen.stride(2), seen.stride(3))),
        scale, parts, min(threads, batch * parts),
    )  # fmt: skip
    if compiled.library(_SOURCE).reattend_mla_decode(ctypes.byref(call)):
        raise MemoryError("mla_decode: no memory for the scratch of one call")
    return out
