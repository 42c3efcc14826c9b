"""Linear layers on int8 weights: W8A8 with optional float outlier columns (LLM.int8()), and W8A16."""

import functools
import logging
from typing import Any, Literal

import torch
from torch import Tensor

from reattend.kernels.int8_linear.reference import Outliers, dynamic_outliers

__all__ = ["Outliers", "int8_linear"]

Activations = Literal["int8", "none"]
Backend = Literal["auto", "triton", "native", "torch"]
_LOG = logging.getLogger(__name__)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def int8_linear(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None, *,
    activations: Activations = "int8", outliers: Outliers | None = None, threshold: float | None = None,
    backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Return x @ (codes * scale)^T + bias in x's dtype, with an fp32 epilogue.

        x       (..., I)       fp32, fp16 or bf16
        codes   (O, I)         int8, contiguous, in [-127, 127]
        scale   (O,) or (O, 1) fp32
        bias    (O,)           any float dtype
        returns (..., O)       x's dtype

    `activations="int8"` quantises each row of x (symmetric, absmax / 127) and sums exactly in int32; "none"
    leaves x as it is. `outliers` are static columns: their int8 side is zero and `weight` (O, N) is added
    in floating point, so that a row's result does not depend on its neighbours. `threshold` instead takes the
    columns where any row of this batch reaches it, with the dequantised weights (bitsandbytes; a host sync).
    A zero row gives the bias; a row with NaN or inf gives NaN.

    `backend`: "triton" (CUDA, or its interpreter), "native" (x86-64 CPUs with a C compiler), "torch", or
    "auto", which logs once what it took and why. Raises `ValueError` for shapes, dtypes or options that do not
    fit and `RuntimeError` for a backend that can't run here.
    """
    _check(x, codes, scale, bias)
    _check_options(activations, outliers, threshold, codes)
    x_MI = x.reshape(-1, x.shape[-1])
    if x_MI.stride(1) != 1:
        x_MI = x_MI.contiguous()
    scale_O = scale if scale.dim() == 1 else scale.reshape(-1)
    if threshold is not None:
        found = dynamic_outliers(x_MI, codes, scale_O, threshold)
        outliers = found if len(found.columns) else None
    bias, outliers = _dense(bias, outliers)
    run = _route(backend, x.device.type, x.shape[-1])
    y_MO: Tensor = run(x_MI, codes, scale_O, bias, outliers, activations == "int8")
    return y_MO.reshape(*x.shape[:-1], codes.shape[0])


def _dense(bias: Tensor | None, outliers: Outliers | None) -> tuple[Tensor | None, Outliers | None]:
    """Return both as the kernels read them, one number behind the other."""
    bias = None if bias is None else bias.contiguous()
    return bias, None if outliers is None else Outliers(*(tensor.contiguous() for tensor in outliers))


def _check(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    if x.dtype not in _FLOATS:
        raise ValueError(f"int8_linear: x is {x.dtype}, not fp32, fp16 or bf16")
    if codes.dtype != torch.int8 or codes.dim() != 2 or not codes.is_contiguous():
        raise ValueError("int8_linear: codes must be a contiguous int8 matrix (O, I)")
    outputs, inputs = codes.shape
    if x.dim() == 0 or x.shape[-1] != inputs or not inputs:
        raise ValueError(f"int8_linear: x {tuple(x.shape)} does not fit codes {tuple(codes.shape)}")
    if scale.dtype != torch.float32 or scale.numel() != outputs or not scale.is_contiguous():
        raise ValueError(f"int8_linear: scale must be fp32 with one number for each of {outputs} outputs")
    if bias is not None and (bias.dim() != 1 or len(bias) != outputs):
        raise ValueError(f"int8_linear: bias {tuple(bias.shape)} does not fit codes {tuple(codes.shape)}")
    device = x.device
    if codes.device != device or scale.device != device or (bias is not None and bias.device != device):
        raise ValueError("int8_linear: x, codes, scale and bias must be on one device")


def _check_options(activations: str, outliers: Outliers | None, threshold: float | None, codes: Tensor) -> None:
    if activations not in ("int8", "none"):
        raise ValueError(f"int8_linear: activations={activations!r}, not 'int8' or 'none'")
    if outliers is None and threshold is None:
        return
    if activations == "none":
        raise ValueError("int8_linear: outliers and threshold belong to activations='int8'")
    if outliers is not None and threshold is not None:
        raise ValueError("int8_linear: outliers (static) and threshold (dynamic) exclude each other")
    if outliers is not None and outliers.weight.shape != (len(codes), len(outliers.columns)):
        raise ValueError("int8_linear: the outlier weight must be (outputs, number of columns)")
    if outliers is not None and not _inside(outliers.columns, codes.shape[1]):
        raise ValueError(f"int8_linear: outlier columns reach outside of {codes.shape[1]} inputs")
    if threshold is not None and not threshold > 0:
        raise ValueError(f"int8_linear: threshold={threshold} is not positive")


def _inside(columns: Tensor, inputs: int) -> bool:
    """Whether columns (ascending) lie in [0, inputs); on a GPU the kernel's owner vouches, as this would sync."""
    if columns.is_cuda or not len(columns):
        return True
    return columns.dtype == torch.int64 and int(columns[0]) >= 0 and int(columns[-1]) < inputs


@functools.lru_cache(maxsize=256)
def _route(backend: str, device: str, inputs: int) -> Any:
    """Return the function that runs; kept, so that a call costs one look-up. Raises where none can."""
    if backend == "auto":
        backend, reason = _fastest(device, inputs)
        _log_once(backend, reason)
    if backend not in _ROUTES:
        raise ValueError(f"int8_linear: backend={backend!r}, not 'auto', 'triton', 'native' or 'torch'")
    return _ROUTES[backend](device, inputs)


@functools.cache
def _log_once(backend: str, reason: str) -> None:
    _LOG.info("int8_linear: %s, because %s", backend, reason)


def _fastest(device: str, inputs: int) -> tuple[str, str]:
    if device == "cuda":
        return "triton", "the tensors are on a GPU"
    if device != "cpu":
        return "torch", f"there is no kernel for {device}"
    from reattend.kernels.int8_linear import native

    missing = native.unavailable() or native.too_wide(inputs)
    if missing:
        return "torch", missing
    return "native", "it is exact and the fastest on CPUs with AVX2"


def _triton(device: str, inputs: int) -> Any:
    try:
        import triton
    except ImportError as error:
        raise RuntimeError("int8_linear: backend 'triton' asked for, and triton is not installed") from error
    if device != "cuda" and not triton.knobs.runtime.interpret:
        raise RuntimeError(f"int8_linear: backend 'triton' can't run on {device}")
    from reattend.kernels.int8_linear import kernel

    return kernel.int8_linear


def _native(device: str, inputs: int) -> Any:
    from reattend.kernels.int8_linear import native

    missing = native.unavailable() or native.too_wide(inputs)
    if missing or device != "cpu":
        raise RuntimeError(f"int8_linear: backend 'native' can't run: {missing or f'tensors are on {device}'}")
    return native.int8_linear


def _torch(device: str, inputs: int) -> Any:
    from reattend.kernels.int8_linear import cpu

    return cpu.int8_linear


_ROUTES = {"triton": _triton, "native": _native, "torch": _torch}
