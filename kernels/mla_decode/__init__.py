"""Attention of few queries over cached MLA rows, in the absorbed form: the rows are read once for all heads."""

import functools
import logging
from typing import Any, Literal

import torch
from torch import Tensor

from reattend.kernels.mla_decode import products

__all__ = ["mla_decode"]

Backend = Literal["auto", "triton", "torch"]
_LOG = logging.getLogger(__name__)
_HALF = (torch.float16, torch.bfloat16)
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
    `backend`: "torch" (any device and float dtype, differentiable), "triton" (CUDA, or its interpreter; fp16 and
    bf16, bool masks, L <= 512, R <= 128), or "auto": Triton on CUDA where it applies, which is logged once.
    Raises `ValueError` for shapes or options that do not fit and `RuntimeError` for a backend that can't run here.
    """
    _check(query_latent, query_rope, latent, rope, mask)
    if backend == "torch" or (backend == "auto" and not query_latent.is_cuda):
        return products.mla_decode(query_latent, query_rope, latent, rope, scale, mask)
    missing = _untriton(query_latent, query_rope, latent, mask)
    run = _route(backend, missing, query_latent.device.type)
    mixed: Tensor = run(query_latent, query_rope, latent, rope, scale, mask)
    return mixed


def _check(query_latent: Tensor, query_rope: Tensor, latent: Tensor, rope: Tensor, mask: Tensor | None) -> None:
    batch, _, queries, rank = query_latent.shape
    tokens = latent.shape[1]
    if query_rope.shape[:3] != query_latent.shape[:3]:
        raise ValueError(f"mla_decode: queries {tuple(query_latent.shape)} and {tuple(query_rope.shape)} do not fit")
    if latent.shape != (batch, tokens, rank) or rope.shape != (batch, tokens, query_rope.shape[-1]) or not tokens:
        raise ValueError(f"mla_decode: rows {tuple(latent.shape)} and {tuple(rope.shape)} do not fit the queries")
    if mask is not None and (mask.dim() != 4 or mask.shape[1:] != (1, queries, tokens)):
        raise ValueError(f"mla_decode: mask {tuple(mask.shape)} is not (.., 1, {queries}, {tokens})")


def _untriton(query_latent: Tensor, query_rope: Tensor, latent: Tensor, mask: Tensor | None) -> str | None:
    """Return why the Triton kernel can't take this call, or None."""
    if query_latent.dtype not in _HALF:
        return f"{query_latent.dtype} is not fp16 or bf16"
    if query_latent.shape[-1] > _WIDEST[0] or query_rope.shape[-1] > _WIDEST[1]:
        return f"rows are wider than {_WIDEST[0]} + {_WIDEST[1]}"
    if mask is not None and mask.dtype != torch.bool:
        return "the mask is not bool"
    if torch.is_grad_enabled() and (query_latent.requires_grad or query_rope.requires_grad or latent.requires_grad):
        return "a gradient is asked for"
    return None


@functools.lru_cache(maxsize=64)
def _route(backend: str, missing: str | None, device: str) -> Any:
    """Return the function that runs; raises where none can."""
    if backend not in ("auto", "triton"):
        raise ValueError(f"mla_decode: backend={backend!r}, not 'auto', 'triton' or 'torch'")
    try:
        import triton
    except ImportError:
        missing = "triton is not installed"
    else:
        if missing is None and device != "cuda" and not triton.knobs.runtime.interpret:
            missing = f"tensors are on {device}"
    if missing is not None and backend == "triton":
        raise RuntimeError(f"mla_decode: backend 'triton' can't run: {missing}")
    _LOG.info("mla_decode: %s", "triton" if missing is None else f"torch, because {missing}")
    if missing is not None:
        return products.mla_decode
    from reattend.kernels.mla_decode import kernel

    return kernel.mla_decode
