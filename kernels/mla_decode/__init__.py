"""Attention of few queries over cached MLA rows, in the absorbed form: the rows are read once for all heads."""

import functools
import logging
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from reattend.kernels.mla_decode import products

__all__ = ["mla_decode"]

Backend = Literal["auto", "triton", "native", "torch"]
_LOG = logging.getLogger(__name__)
_WIDEST = 512, 128  # latent and rotary numbers that the Triton tiles are made for


def mla_decode(
    query_latent: Tensor, query_rope: Tensor, latent: Tensor, rope: Tensor, *, scale: float,
    mask: Tensor | None = None, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Return softmax(scale (query_latent latent^T + query_rope rope^T), masked) latent.

        query_latent (B, H, S, L)  queries of H heads, taken into the latent space
        query_rope   (B, H, S, R)  their rotary part, rotated
        latent       (B, T, L)     what is cached per token; last dimension contiguous
        rope         (B, T, R)
        mask         (B or 1, 1, S, T), bool (true where a query sees a token) or numbers to add
        returns      (B, H, S, L)

    `scale` is that of the expanded form, (nope + rope)^-1/2. A query that sees nothing gives some mean, no NaN.
    `backend`: "torch" (any device, float dtype and mask; differentiable), "native" (x86-64 CPUs with a C compiler;
    fp32, L a multiple of 32, R of 8), "triton" (CUDA, or its interpreter; fp16 and bf16, L <= 512, R <= 128), or
    "auto": the fastest that applies; where that is torch, why is logged once.
    Raises `ValueError` for shapes or options that do not fit and `RuntimeError` for a backend that can't run here.
    """
    _check(query_latent, query_rope, latent, rope, mask)
    if not query_latent.numel():
        return query_latent.clone()
    tensors = (query_latent, query_rope, latent, rope)
    if backend == "torch" or _needs_torch(tensors, mask, backend):
        return products.mla_decode(*tensors, scale, mask)
    run = _route(backend, latent.device.type, latent.dtype, (latent.shape[-1], rope.shape[-1]))
    mixed: Tensor = run(*tensors, scale, mask)
    return mixed


def _check(query_latent: Tensor, query_rope: Tensor, latent: Tensor, rope: Tensor, mask: Tensor | None) -> None:
    batch, _, queries, rank = query_latent.shape
    tokens = latent.shape[1]
    if len({(tensor.dtype, tensor.device) for tensor in (query_latent, query_rope, latent, rope)}) > 1:
        raise ValueError("mla_decode: queries and rows must have one dtype and be on one device")
    if latent.stride(-1) != 1 or rope.stride(-1) != 1:
        raise ValueError("mla_decode: the last dimension of rows must be contiguous")
    if query_rope.shape[:3] != query_latent.shape[:3]:
        raise ValueError(f"mla_decode: queries {tuple(query_latent.shape)} and {tuple(query_rope.shape)} do not fit")
    if latent.shape != (batch, tokens, rank) or rope.shape != (batch, tokens, query_rope.shape[-1]) or not tokens:
        raise ValueError(f"mla_decode: rows {tuple(latent.shape)} and {tuple(rope.shape)} do not fit the queries")
    if mask is not None and (mask.dim() != 4 or mask.shape[1:] != (1, queries, tokens)):
        raise ValueError(f"mla_decode: mask {tuple(mask.shape)} is not (.., 1, {queries}, {tokens})")


def _needs_torch(tensors: tuple[Tensor, ...], mask: Tensor | None, backend: str) -> bool:
    """Whether this call wants what only torch's route does; raises where another was asked for by name."""
    gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    numbers = mask is not None and mask.dtype != torch.bool
    if (gradient or numbers) and backend != "auto":
        raise RuntimeError(f"mla_decode: backend {backend!r} can't do {'gradients' if gradient else 'such a mask'}")
    return gradient or numbers


@functools.lru_cache(maxsize=64)
def _route(backend: str, device: str, dtype: torch.dtype, widths: tuple[int, int]) -> Any:
    """Return the function that runs; kept, so that a call costs one look-up. Raises where none can."""
    if backend not in ("auto", *_ROUTES):
        raise ValueError(f"mla_decode: backend={backend!r}, not 'auto', 'triton', 'native' or 'torch'")
    name = backend if backend != "auto" else "triton" if device == "cuda" else "native"
    missing = _missing(name, device, dtype, widths)
    if missing is None:
        return _ROUTES[name]()
    if backend != "auto":
        raise RuntimeError(f"mla_decode: backend {backend!r} can't run: {missing}")
    _LOG.info("mla_decode: torch for %s %s, because %s", dtype, widths, missing)
    return products.mla_decode


def _missing(name: str, device: str, dtype: torch.dtype, widths: tuple[int, int]) -> str | None:
    """Return why a route can't run tensors like these, or None."""
    if name == "native":
        from reattend.kernels.mla_decode import native

        if device != "cpu" or dtype != torch.float32:
            return f"tensors are {dtype} on {device}, not torch.float32 on cpu"
        return native.unfit(*widths) or native.unavailable()
    if find_spec("triton") is None:
        return "triton is not installed"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"tensors are {dtype}, not of 16 bits"
    if any(width > widest for width, widest in zip(widths, _WIDEST, strict=True)):
        return f"rows are wider than {_WIDEST[0]} + {_WIDEST[1]}"
    import triton

    return None if device == "cuda" or triton.knobs.runtime.interpret else f"tensors are on {device}"


def _triton() -> Any:
    from reattend.kernels.mla_decode import kernel

    return kernel.mla_decode


def _native() -> Any:
    from reattend.kernels.mla_decode import native

    return native.mla_decode


_ROUTES = {"triton": _triton, "native": _native}
