"""Attention of many queries or few: exact softmax attention with the options that pretrained models use."""

import functools
import importlib
import logging
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from reattend.kernels.attention import products
from reattend.kernels.attention.options import Options, check

__all__ = ["Options", "attention", "attention_with_lse"]

Backend = Literal["auto", "triton", "native", "torch"]
_LOG = logging.getLogger(__name__)
_PLAIN = Options()


def attention(
    query: Tensor, key: Tensor, value: Tensor, options: Options = _PLAIN, *, backend: Backend = "auto"
) -> Tensor:
    """Return softmax(scale query key^T) value, as `options` change it; (B, H, S, V) in the query's dtype.

        query (B, H, S, D)   H a multiple of G: head h reads key head h // (H / G); nothing is repeated
        key   (B, G, T, D)
        value (B, G, T, V)

    `backend`: "torch" (any device, float dtype and option; differentiable), "native" (x86-64 CPUs with AVX512 BF16
    and a C compiler; bf16, no option but `causal`, `scale`, `window`, `ranges` and `sinks`; no gradients), "triton"
    (CUDA, or its interpreter; fp32, fp16 and bf16, D and V up to 256, no `mask`; gradients of all tensors but
    `slopes` and `gamma`), or "auto": the fastest that applies; where that is torch, why is
    logged once. While something traces torch's calls (torch.compile) that is torch.
    Raises `ValueError` for shapes or options that do not fit and `RuntimeError` for a backend that can't run here.
    """
    return _run(query, key, value, options, backend, lse=False)[0]


def attention_with_lse(
    query: Tensor, key: Tensor, value: Tensor, options: Options = _PLAIN, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Return `attention` and each row's log-sum-exp of scores (B, H, S), natural logarithm, fp32 at least."""
    output, lse = _run(query, key, value, options, backend, lse=True)
    assert lse is not None
    return output, lse


def _run(
    query: Tensor, key: Tensor, value: Tensor, options: Options, backend: str, *, lse: bool
) -> tuple[Tensor, Tensor | None]:
    check(query, key, value, options)
    if not query.numel() or not key.shape[2]:
        return products.attention(query, key, value, options, lse=lse)
    run = _route(query, key, value, options, backend)
    result: tuple[Tensor, Tensor | None] = run(query, key, value, options, lse=lse)
    return result


def _route(query: Tensor, key: Tensor, value: Tensor, options: Options, backend: str) -> Any:
    """Return the function that runs. Raises where the one that was asked for can't."""
    if backend not in ("auto", "torch", *_MODULES):
        raise ValueError(f"attention: backend={backend!r}, not 'auto', 'triton', 'native' or 'torch'")
    if backend == "torch" or (backend == "auto" and _is_traced(query)):
        return products.attention
    name = backend if backend != "auto" else "triton" if query.is_cuda else "native"
    missing = _unavailable(name) or _module(name).unfit(query, key, value, options)
    if missing is None:
        return _module(name).attention
    if backend != "auto":
        raise RuntimeError(f"attention: backend {backend!r} can't run: {missing}")
    _log_once(missing)
    return products.attention


def _is_traced(query: Tensor) -> bool:
    """Whether something watches torch's calls, and would not see what a kernel does: compile, trace, fake tensors."""
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    return traced or type(query) not in (Tensor, torch.nn.Parameter)


@functools.cache
def _unavailable(name: str) -> str | None:
    return "triton is not installed" if name == "triton" and find_spec("triton") is None else None


@functools.cache
def _module(name: str) -> Any:
    return importlib.import_module(_MODULES[name])


@functools.cache
def _log_once(missing: str) -> None:
    _LOG.info("attention: torch, because %s", missing)


_MODULES = {
    "triton": "reattend.kernels.attention.triton_route",
    "native": "reattend.kernels.attention.native",
}
