"""Decode of layers that share attention: a leader keeps its row of scores, its followers read values alone."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from reattend.kernels.shared_decode import products

__all__ = ["Row", "follow", "lead"]

Backend = Literal["auto", "triton", "torch"]
_WIDEST = 256  # numbers per head that the Triton tiles are made for


@dataclass(frozen=True)
class Row:
    """What one query of each head makes of the cached keys: scaled scores (B, H, T) and their log-sum-exp (B, H).

    Natural logarithms, fp32 (fp64 for fp64 tensors); a key that is not seen has score -inf.
    """

    score: Tensor
    lse: Tensor


def lead(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, mask: Tensor | None = None, backend: Backend = "auto"
) -> tuple[Tensor, Row]:
    """Return softmax(scale query key^T) value (B, H, 1, V) for one query per head, and the row of scores.

        query (B, H, 1, D)   H a multiple of G: head h reads key head h // (H / G)
        key   (B, G, T, D)
        value (B, G, T, V)
        mask  bool, broadcast to (B, H, 1, T): true where a key is seen; None: all are

    `backend`: "torch" (any device and float dtype), "triton" (CUDA, or its interpreter; fp32, fp16 and bf16, D and V
    up to 256) or "auto", which is triton on CUDA where it fits. No gradients. Where no key is seen the output is 0
    and the log-sum-exp -inf. Raises `ValueError` for shapes that don't fit, `RuntimeError` for a backend that can't
    run.
    """
    batch, heads, queries, width = query.shape
    groups, tokens = key.shape[1:3]
    if queries != 1 or heads % groups or key.shape != (batch, groups, tokens, width) or not tokens:
        raise ValueError(f"shared_decode: query {tuple(query.shape)} and key {tuple(key.shape)} do not fit")
    _check_value(value, batch, groups, tokens)
    if _is_triton(backend, query.device, query.dtype, max(width, value.shape[3])):
        from reattend.kernels.shared_decode import kernel

        output, score, lse = kernel.lead(query, key, value, scale, mask)
    else:
        output, score, lse = products.lead(query, key, value, scale, mask)
    return output, Row(score, lse)


def follow(row: Row, value: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Return the leader's attention weights times other values: (B, H, 1, V) in their dtype.

    `value` is (B, G, T, V); head h of the row reads value head h // (H / G). Reads no keys: T V numbers per value
    head and T scores per head. `backend` and errors as for `lead`.
    """
    batch, heads, tokens = row.score.shape
    if heads % value.shape[1]:
        raise ValueError(f"shared_decode: {heads} heads don't divide among {value.shape[1]} value heads")
    _check_value(value, batch, value.shape[1], tokens)
    if _is_triton(backend, value.device, value.dtype, value.shape[3]):
        from reattend.kernels.shared_decode import kernel

        followed: Tensor = kernel.follow(row.score, row.lse, value)
        return followed
    return products.follow(row.score, row.lse, value)


def _check_value(value: Tensor, batch: int, groups: int, tokens: int) -> None:
    if value.dim() != 4 or value.shape[:3] != (batch, groups, tokens):
        raise ValueError(f"shared_decode: value {tuple(value.shape)} is not ({batch}, {groups}, {tokens}, V)")


def _is_triton(backend: str, device: torch.device, dtype: torch.dtype, width: int) -> bool:
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"shared_decode: backend={backend!r}, not 'auto', 'triton' or 'torch'")
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return False
    missing = _missing(device, dtype, width)
    if missing is not None and backend == "triton":
        raise RuntimeError(f"shared_decode: backend 'triton' can't run: {missing}")
    return missing is None


def _missing(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Return why Triton can't run tensors like these, or None."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16) or width > _WIDEST:
        return f"tensors are {dtype} with {width} numbers per head"
    import triton

    knobs: Any = triton.knobs
    return None if device.type == "cuda" or knobs.runtime.interpret else f"tensors are on {device}"
