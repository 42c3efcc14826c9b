"""Attention on 8-bit queries and keys, as SageAttention does it: quantised on the fly, nothing is trained."""

import functools
import logging
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from reattend.kernels import attention as exact
from reattend.kernels.attention import Options
from reattend.kernels.attention.options import check
from reattend.kernels.attention_int8 import formulas, reference
from reattend.kernels.attention_int8.formulas import Quantization

__all__ = ["Options", "Quantization", "attention_int8", "attention_int8_with_lse"]

Backend = Literal["auto", "triton", "reference"]
_LOG = logging.getLogger(__name__)
_PLAIN = Options()
_INT8 = Quantization()
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_FEW_KEYS = 512


def attention_int8(
    query: Tensor, key: Tensor, value: Tensor, options: Options = _PLAIN, how: Quantization = _INT8, *,
    backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Return softmax(scale query key^T) value (B, H, S, V) in the query's dtype, from int8 queries and keys.

        query (B, H, S, D)   fp32, fp16 or bf16; H a multiple of G: head h reads key head h // (H / G)
        key   (B, G, T, D)
        value (B, G, T, V)

    Of `options`: `causal` (aligned at the last key), `scale`, `window`, `ranges` and `sinks`. What no query of a
    sequence sees, such as padding, changes nothing. A query without keys puts out 0. NaN or inf in a key or value
    that is seen may reach all of its sequence's rows.

    `backend`: "triton" (NVIDIA GPUs of compute capability 8.0, with fp8 values 8.9, and Triton's interpreter; D and
    V up to 256), "reference" (the same arithmetic in torch, on any device) or "auto": Triton on a GPU, except where
    it would gain nothing or can't run; then exact attention, `reattend.kernels.attention`. That is so on a CPU, for
    a single query, for fewer than 512 keys, for heads wider than 256 and where gradients are wanted; it is logged
    once for each reason. A simulation (`Quantization.is_simulated`) is always the reference's.

    SageAttention (arXiv 2410.02367, section 4), SageAttention2 (arXiv 2411.10958, section 3). Raises `ValueError`
    for shapes, dtypes or options that do not fit and `RuntimeError` for a backend that can't run here, or that was
    asked for by name and gradients with it.
    """
    return _run(query, key, value, options, how, backend, lse=False)[0]


def attention_int8_with_lse(
    query: Tensor, key: Tensor, value: Tensor, options: Options = _PLAIN, how: Quantization = _INT8, *,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return `attention_int8` and each row's log-sum-exp of scores (B, H, S), natural logarithm, fp32.

    It is that of the scores as they were before keys were smoothed; -inf for a query without keys or sink.
    """
    output, lse = _run(query, key, value, options, how, backend, lse=True)
    assert lse is not None
    return output, lse


def _run(
    query: Tensor, key: Tensor, value: Tensor, options: Options, how: Quantization, backend: str, *, lse: bool
) -> tuple[Tensor, Tensor | None]:
    check(query, key, value, options)
    _check(query, options, backend)
    run = _nothing if not query.numel() or not key.shape[2] else _route(query, key, value, options, how, backend)
    if run is None:
        if lse:
            return exact.attention_with_lse(query, key, value, options)
        return exact.attention(query, key, value, options), None
    output, sums = run(query, key, value, replace(options, sinks=None), how)
    return (output, sums) if options.sinks is None else formulas.with_sinks(output, sums, options.sinks)


def _nothing(query: Tensor, key: Tensor, value: Tensor, options: Options, how: Quantization) -> tuple[Tensor, Tensor]:
    lse = torch.full(query.shape[:3], -torch.inf, device=query.device)
    return query.new_zeros(*query.shape[:3], value.shape[3]), lse


def _check(query: Tensor, options: Options, backend: str) -> None:
    if backend not in ("auto", "triton", "reference"):
        raise ValueError(f"attention_int8: backend={backend!r}, not 'auto', 'triton' or 'reference'")
    if query.dtype not in _FLOATS:
        raise ValueError(f"attention_int8: query is {query.dtype}, not fp32, fp16 or bf16")
    for name in ("mask", "slopes", "softcap", "gamma"):
        if getattr(options, name) is not None:
            raise ValueError(f"attention_int8: {name} is not supported; reattend.kernels.attention knows it")
    if options.is_clipped:
        raise ValueError("attention_int8: zeta is not supported; reattend.kernels.attention knows it")


def _route(query: Tensor, key: Tensor, value: Tensor, options: Options, how: Quantization, backend: str) -> Any:
    """Return the function that runs, None for exact attention. Raises where the one that was asked for can't."""
    tensors = (query, key, value, options.sinks)
    gradients = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if gradients and (backend != "auto" or how.is_simulated):
        raise RuntimeError("attention_int8: there are no gradients; call it under torch.no_grad()")
    if backend == "reference" or (backend == "auto" and how.is_simulated):
        return reference.attention
    if backend == "triton":
        if missing := _unfit(query, key, value, how):
            raise RuntimeError(f"attention_int8: backend 'triton' can't run: {missing}")
        return _kernel().attention
    return None if _prefers_exact(query, key, value, how, gradients) else _kernel().attention


def _prefers_exact(query: Tensor, key: Tensor, value: Tensor, how: Quantization, gradients: bool) -> bool:
    """Whether "auto" takes exact attention; logged once for each reason, as a warning if that may be a surprise."""
    if query.device.type == "cpu":
        _log_once(logging.WARNING, "exact attention on a CPU, where 8 bits gain nothing")
    elif gradients:
        _log_once(logging.WARNING, "exact attention, because gradients are wanted")
    elif query.shape[2] == 1 or key.shape[2] < _FEW_KEYS:
        _log_once(logging.INFO, f"exact attention for single queries and for fewer than {_FEW_KEYS} keys")
    elif missing := _unfit(query, key, value, how):
        _log_once(logging.WARNING, f"exact attention, because {missing}")
    else:
        return False
    return True


@functools.cache
def _log_once(level: int, message: str) -> None:
    _LOG.log(level, "attention_int8: %s", message)


def _unfit(query: Tensor, key: Tensor, value: Tensor, how: Quantization) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    missing: str | None = _kernel().unfit(query, key, value, how)
    return missing


@functools.cache
def _kernel() -> Any:
    from reattend.kernels.attention_int8 import kernel

    return kernel
