"""The compiled CPU route: `native.c`, built once with the host's C compiler, called through ctypes.

Torch's own operators are wrong or slow on x86 hosts without VNNI: `qlinear` saturates at full-range codes,
`_int_mm` is scalar code, `_weight_int8pack_mm` is quick for bf16 alone and returns bf16. With VNNI `qlinear` is
exact and quick, but keeps a second copy of the weights, and leaves rounding and scaling of rows to its caller.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from reattend.kernels import compiled
from reattend.kernels.int8_linear.reference import Outliers

_SOURCE = Path(__file__).with_name("native.c")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Above this, packing W into panels costs less than reading each of its rows again per row of x (measured).
_FEW_ROWS, _FEW_ROWS_AVX512 = 6, 2
# An exact int32 sum of products of codes: I * 127^2 < 2^31.
MAX_INPUTS = 133_144
# Below this many products a second thread costs more than it saves.
_THREAD_PRODUCTS = 1 << 17


class _Linear(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "codes", "scale", "bias", "columns", "slice", "y")),
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "outputs", "outliers", "stride_x")),
        *((name, ctypes.c_int) for name in ("dtype", "quantize", "vnni", "bf16", "threads")),
    )


def unavailable() -> str | None:
    """Return why this host can't run the compiled route, or None; compiles on the first call."""
    return compiled.unavailable(_SOURCE)


@functools.cache
def has_vnni() -> bool:
    """Whether this host multiplies bytes four at a time (AVX512 VNNI)."""
    return bool(compiled.library(_SOURCE).reattend_has_vnni())


@functools.cache
def has_bf16() -> bool:
    """Whether this host multiplies bf16 numbers (AVX512 BF16), and the compiler knew how."""
    return bool(compiled.library(_SOURCE).reattend_has_bf16())


def too_wide(inputs: int) -> str | None:
    """Return why rows of this many inputs can't go the compiled route, or None."""
    return f"more than {MAX_INPUTS} inputs overflow an int32 sum" if inputs > MAX_INPUTS else None


def int8_linear(
    x_MI: Tensor, codes_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None, outliers: Outliers | None, quantize: bool
) -> Tensor:
    """Both forms of the linear in one call: quantisation, product, epilogue, outliers. Returns (M, O)."""
    rows, inputs = x_MI.shape
    outputs = codes_OI.shape[0]
    y_MO = torch.empty(rows, outputs, dtype=x_MI.dtype)
    if rows == 0 or outputs == 0:
        return y_MO
    bias = bias_O if bias_O is None else bias_O.float().contiguous()
    columns, weight = (None, None) if outliers is None else outliers
    weight = None if weight is None else weight.float().contiguous()
    threads = torch.get_num_threads() if rows * inputs * outputs >= _THREAD_PRODUCTS else 1
    vnni, bf16 = has_vnni(), has_bf16()
    wide = vnni if quantize else bf16 and x_MI.dtype == torch.bfloat16
    few = _FEW_ROWS_AVX512 if wide else _FEW_ROWS
    linear = _Linear(
        x_MI.data_ptr(), codes_OI.data_ptr(), scale_O.data_ptr(),
        None if bias is None else bias.data_ptr(), None if columns is None else columns.data_ptr(),
        None if weight is None else weight.data_ptr(), y_MO.data_ptr(),
        rows, inputs, outputs, 0 if columns is None else len(columns), x_MI.stride(0),
        _DTYPES[x_MI.dtype], quantize, vnni, bf16, threads,
    )  # fmt: skip
    if compiled.library(_SOURCE).reattend_int8_linear(ctypes.byref(linear), ctypes.c_int64(few)):
        raise MemoryError("int8_linear: no memory for the scratch of one call")
    return y_MO
