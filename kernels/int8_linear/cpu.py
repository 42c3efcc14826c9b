"""Int8 linears from torch's own operators, for hosts that can't build `native.c`.

What each operator is good for without VNNI was measured on Zen 3: docs/int8.md.
Legend: M rows, I input channels, O output channels.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.weak import WeakTensorKeyDictionary

from reattend.kernels.int8_linear.reference import Outliers, quantize_rows

# Weights are widened this many numbers at a time: the block is multiplied while it is in the cache.
_BLOCK_NUMBERS = 1 << 18
# _int_mm needs no packed copy, and wins up to here on VNNI hosts.
_INT_MM_ROWS = 8
# _weight_int8pack_mm beats a blocked fp32 product up to here; for bf16 only (fp32 and fp16 are scalar code).
_INT8PACK_ROWS = 8
_packed: Any = WeakTensorKeyDictionary()


def int8_linear(
    x_MI: Tensor, codes_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None, outliers: Outliers | None, quantize: bool
) -> Tensor:
    """Both forms of the linear (M, O)."""
    if quantize:
        return w8a8(x_MI, codes_OI, scale_O, bias_O, outliers)
    return w8a16(x_MI, codes_OI, scale_O, bias_O)


def w8a8(
    x_MI: Tensor, codes_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None = None, outliers: Outliers | None = None
) -> Tensor:
    """`reference.w8a8` up to fp32 rounding of the epilogue."""
    a_codes, a_scale = quantize_rows(x_MI, None if outliers is None else outliers.columns)
    y_MO = _product(a_codes, codes_OI) * a_scale[:, None] * scale_O
    if outliers is not None:
        kept = x_MI.index_select(1, outliers.columns).float()
        y_MO = y_MO.addmm_(kept, outliers.weight.float().T)
    return (y_MO if bias_O is None else y_MO.add_(bias_O.float())).to(x_MI.dtype)


def w8a16(x_MI: Tensor, codes_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`reference.w8a16` up to fp32 rounding; for a few rows of bf16, up to a second rounding to bf16."""
    rows, inputs = x_MI.shape
    # With I % 16 != 0 the operator returns wrong values or reads past the end.
    if x_MI.dtype == torch.bfloat16 and 0 < rows <= _INT8PACK_ROWS and inputs % 16 == 0:
        ones = torch.ones(len(scale_O), dtype=torch.bfloat16)
        y_MO = torch._weight_int8pack_mm(x_MI.contiguous(), codes_OI, ones).float() * scale_O
    else:
        y_MO = _blocked(x_MI.float(), codes_OI) * scale_O
    return (y_MO if bias_O is None else y_MO.add_(bias_O.float())).to(x_MI.dtype)


def _product(a_codes: Tensor, codes_OI: Tensor) -> Tensor:
    """Codes times codes as fp32 (M, O): exact sums, rounded once where they pass 2^24."""
    if not has_vnni():
        return _blocked(a_codes.float(), codes_OI)
    if len(a_codes) <= _INT_MM_ROWS:
        return torch._int_mm(a_codes, codes_OI.t()).float()
    weight, ones, zeros = _pack(codes_OI)
    # u8 with zero point 128: oneDNN has no kernel for s8 activations short of AMX, and falls to its reference.
    shifted = (a_codes.to(torch.int16) + 128).to(torch.uint8)
    y_MO: Tensor = torch.ops.onednn.qlinear_pointwise(
        shifted, 1.0, 128, weight, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return y_MO


def has_vnni() -> bool:
    """Whether u8 x s8 products are exact here; without VNNI their 16-bit pair sums saturate."""
    supported: bool = torch.cpu._is_vnni_supported()
    return supported


def _pack(codes_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return oneDNN's own copy of the codes, made at first use and dropped with them."""
    found = _packed.get(codes_OI)
    if found is None or found[0] != codes_OI._version:
        outputs = codes_OI.shape[0]
        packed = torch.ops.onednn.qlinear_prepack(codes_OI, None)
        found = (codes_OI._version, packed, torch.ones(outputs), torch.zeros(outputs, dtype=torch.int32))
        _packed[codes_OI] = found
    return found[1], found[2], found[3]


def _blocked(x_MI: Tensor, codes_OI: Tensor) -> Tensor:
    rows = max(1, _BLOCK_NUMBERS // max(1, codes_OI.shape[1]))
    parts = [linear(x_MI, block.float()) for block in torch.split(codes_OI, rows)]
    return torch.cat(parts, 1) if parts else x_MI.new_empty(len(x_MI), 0)
