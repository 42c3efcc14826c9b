"""Triton int8 linears: row quantisation, W8A8 GEMM, W8A16 GEMM and GEMV, and how they are launched.

Legend: M rows (tokens), I input channels, O output channels, N outlier columns. Pointers start with `p_`,
offsets with `o_`, masks with `m_`, blocks with `b_`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from reattend.kernels import launching
from reattend.kernels.int8_linear.reference import CODE_MAX, ZERO_ROW, Outliers
from reattend.kernels.output_tiles import Config, grid, output_tile, store_output

# Adding and subtracting 1.5 * 2^23 rounds an fp32 of magnitude below 2^22 half to even.
_ROUND = tl.constexpr(12582912.0)
_CODE_MAX = tl.constexpr(float(CODE_MAX))
_ZERO_ROW = tl.constexpr(ZERO_ROW)
GEMV_ROWS = 4


# Few rows leave the tensor cores idle: small row tile, deep I. `tests/kernels/test_compile.py` compiles all.
W8A8_SMALL = Config(16, 64, 128, 4, 4)
W8A8_MEDIUM = Config(64, 128, 64, 4, 4)
W8A8_LARGE = Config(128, 128, 64, 8, 3)
W8A16_SMALL = Config(16, 64, 64, 4, 3)
W8A16_LARGE = Config(128, 128, 32, 8, 3)
W8A16_FP32 = Config(32, 64, 16, 4, 2)  # fp32 products run on the scalar units: registers bound the tile
W8A8_CONFIGS = (W8A8_SMALL, W8A8_MEDIUM, W8A8_LARGE)
GEMV = Config(1, 16, 512, 4, 2)
QUANTIZE = Config(1, 1, 2048, 4, 2)
OUTLIER_BLOCK = 16


@triton.jit
def _quantize_rows_kernel(p_x, p_mask, p_codes, p_scale, I, stride_x, HAS_MASK: tl.constexpr, BLOCK_I: tl.constexpr):
    i_m = tl.program_id(0).to(tl.int64)
    absmax = tl.zeros([BLOCK_I], tl.float32)
    poison = tl.zeros([BLOCK_I], tl.float32)
    for start in range(0, I, BLOCK_I):
        o_i = start + tl.arange(0, BLOCK_I)
        b_x = tl.load(p_x + i_m * stride_x + o_i, mask=o_i < I, other=0.0).to(tl.float32)
        if HAS_MASK:
            b_x = tl.where(tl.load(p_mask + o_i, mask=o_i < I, other=1) != 0, 0.0, b_x)
        absmax = tl.maximum(absmax, tl.abs(b_x))
        poison += b_x * 0.0  # NaN where x is NaN or inf: maximum() drops NaN
    row_max = tl.max(absmax, axis=0)
    row_max = tl.where(row_max < _ZERO_ROW, 0.0, row_max)
    # The compiler's own division may be off by an ulp, and codes with it.
    code_max = tl.full(row_max.shape, _CODE_MAX, tl.float32)
    inverse = tl.where(row_max > 0, tl.div_rn(code_max, tl.where(row_max > 0, row_max, 1.0)), 0.0)
    tl.store(p_scale + i_m, tl.div_rn(row_max, code_max) + tl.sum(poison, axis=0))
    for start in range(0, I, BLOCK_I):
        o_i = start + tl.arange(0, BLOCK_I)
        b_x = tl.load(p_x + i_m * stride_x + o_i, mask=o_i < I, other=0.0).to(tl.float32)
        if HAS_MASK:
            b_x = tl.where(tl.load(p_mask + o_i, mask=o_i < I, other=1) != 0, 0.0, b_x)
        b_x = (b_x * inverse + _ROUND) - _ROUND
        b_x = tl.where(b_x == b_x, b_x, 0.0)
        b_x = tl.minimum(tl.maximum(b_x, -_CODE_MAX), _CODE_MAX)
        tl.store(p_codes + i_m * I + o_i, b_x.to(tl.int8), mask=o_i < I)


@triton.jit
def _w8a8_kernel(
    p_a, p_a_scale, p_w, p_w_scale, p_bias, p_x, p_columns, p_slice, p_y, M, O, I, N, stride_x,
    HAS_BIAS: tl.constexpr, HAS_OUTLIERS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    o_m, o_o = output_tile(M, O, BLOCK_M, BLOCK_O, 8)
    m_m, m_o = o_m < M, o_o < O
    acc = tl.zeros([BLOCK_M, BLOCK_O], tl.int32)
    for start in range(0, I, BLOCK_I):
        o_i = start + tl.arange(0, BLOCK_I)
        b_a = tl.load(p_a + o_m[:, None] * I + o_i[None, :], mask=m_m[:, None] & (o_i < I)[None, :], other=0)
        b_w = tl.load(p_w + o_o[None, :] * I + o_i[:, None], mask=m_o[None, :] & (o_i < I)[:, None], other=0)
        acc = tl.dot(b_a, b_w, acc, out_dtype=tl.int32)
    b_a_scale = tl.load(p_a_scale + o_m, mask=m_m, other=0.0)
    b_w_scale = tl.load(p_w_scale + o_o, mask=m_o, other=0.0)
    y = acc.to(tl.float32) * b_a_scale[:, None] * b_w_scale[None, :]
    if HAS_OUTLIERS and p_x.dtype.element_ty == tl.float32:
        # Column by column: as a dot in full fp32, operands and result together overflow the registers.
        for n in range(0, N):
            o_column = tl.load(p_columns + n)
            b_x = tl.load(p_x + o_m * stride_x + o_column, mask=m_m, other=0.0)
            b_s = tl.load(p_slice + o_o * N + n, mask=m_o, other=0.0).to(tl.float32)
            y += b_x[:, None] * b_s[None, :]
    elif HAS_OUTLIERS:
        for start in range(0, N, BLOCK_N):
            o_n = start + tl.arange(0, BLOCK_N)
            m_n = o_n < N
            o_column = tl.load(p_columns + o_n, mask=m_n, other=0)
            m_x, m_s = m_m[:, None] & m_n[None, :], m_o[None, :] & m_n[:, None]
            b_x = tl.load(p_x + o_m[:, None] * stride_x + o_column[None, :], mask=m_x, other=0.0)
            b_s = tl.load(p_slice + o_o[None, :] * N + o_n[:, None], mask=m_s, other=0.0)
            y = tl.dot(b_x, b_s.to(b_x.dtype), y)
    store_output(y, p_bias, p_y, o_m, o_o, M, O, HAS_BIAS)


@triton.jit
def _w8a16_kernel(
    p_x, p_w, p_w_scale, p_bias, p_y, M, O, I, stride_x, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    o_m, o_o = output_tile(M, O, BLOCK_M, BLOCK_O, 8)
    m_m, m_o = o_m < M, o_o < O
    y = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
    for start in range(0, I, BLOCK_I):
        o_i = start + tl.arange(0, BLOCK_I)
        b_x = tl.load(p_x + o_m[:, None] * stride_x + o_i[None, :], mask=m_m[:, None] & (o_i < I)[None, :], other=0.0)
        b_w = tl.load(p_w + o_o[None, :] * I + o_i[:, None], mask=m_o[None, :] & (o_i < I)[:, None], other=0)
        # A code is exact in any float dtype, so the scale can wait for the epilogue.
        y = tl.dot(b_x, b_w.to(b_x.dtype), y, input_precision="ieee")
    y *= tl.load(p_w_scale + o_o, mask=m_o, other=0.0)[None, :]
    store_output(y, p_bias, p_y, o_m, o_o, M, O, HAS_BIAS)


@triton.jit
def _w8a16_gemv_kernel(
    p_x, p_w, p_w_scale, p_bias, p_y, O, I, stride_x,
    HAS_BIAS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    i_m = tl.program_id(1).to(tl.int64)
    o_o = (tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)
    m_o = o_o < O
    acc = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for start in range(0, I, BLOCK_I):
        o_i = start + tl.arange(0, BLOCK_I)
        b_x = tl.load(p_x + i_m * stride_x + o_i, mask=o_i < I, other=0.0).to(tl.float32)
        b_w = tl.load(p_w + o_o[:, None] * I + o_i[None, :], mask=m_o[:, None] & (o_i < I)[None, :], other=0)
        acc += b_w.to(tl.float32) * b_x[None, :]
    y = tl.sum(acc, axis=1) * tl.load(p_w_scale + o_o, mask=m_o, other=0.0)
    if HAS_BIAS:
        y += tl.load(p_bias + o_o, mask=m_o, other=0.0).to(tl.float32)
    tl.store(p_y + i_m * O + o_o, y.to(p_y.dtype.element_ty), mask=m_o)


def _options(config: Config) -> dict[str, Any]:
    return {"num_warps": config.num_warps, "num_stages": config.num_stages}


def quantize_rows(x_MI: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`reference.quantize_rows` in one launch (two reads of a row, the second from cache)."""
    rows, width = x_MI.shape
    codes = torch.empty(rows, width, dtype=torch.int8, device=x_MI.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x_MI.device)
    mask = None
    if columns is not None:
        mask = torch.zeros(width, dtype=torch.int8, device=x_MI.device).index_fill_(0, columns, 1)
    block = min(QUANTIZE.block_i, triton.next_power_of_2(width))
    # A product fused with the rounding constant would be rounded once, not twice: another code at ties.
    _quantize_rows_kernel[(rows,)](
        x_MI, x_MI if mask is None else mask, codes, scale, width, x_MI.stride(0), mask is not None, block,
        enable_fp_fusion=False, **_options(QUANTIZE),
    )  # fmt: skip
    return codes, scale


def w8a8_config(rows: int) -> Config:
    """Return the tile for this number of rows."""
    return W8A8_SMALL if rows <= 16 else W8A8_MEDIUM if rows <= 256 else W8A8_LARGE


def w8a16_configs(full_precision: bool) -> tuple[Config, ...]:
    """Return the tiles shipped for fp32 inputs (`full_precision`) or 16-bit ones."""
    return (W8A16_FP32,) if full_precision else (W8A16_SMALL, W8A16_LARGE)


def w8a8(
    x_MI: Tensor, codes_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None = None, outliers: Outliers | None = None
) -> Tensor:
    """`reference.w8a8` in two launches; `x_MI` has unit stride along I."""
    a_codes, a_scale = quantize_rows(x_MI, None if outliers is None else outliers.columns)
    (rows, width), outputs = x_MI.shape, codes_OI.shape[0]
    y_MO = torch.empty(rows, outputs, dtype=x_MI.dtype, device=x_MI.device)
    config = w8a8_config(rows)
    columns, weight = (a_codes, a_codes) if outliers is None else outliers
    _w8a8_kernel[grid(rows, outputs, config)](
        a_codes, a_scale, codes_OI, scale_O, scale_O if bias_O is None else bias_O, x_MI, columns, weight, y_MO,
        rows, outputs, width, 0 if outliers is None else len(columns), x_MI.stride(0),
        bias_O is not None, outliers is not None, config.block_m, config.block_o, config.block_i, OUTLIER_BLOCK,
        enable_fp_fusion=True, **_options(config),
    )  # fmt: skip
    return y_MO


def w8a16(x_MI: Tensor, codes_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`reference.w8a16` in one launch: a GEMV for up to GEMV_ROWS rows, tensor cores above."""
    (rows, width), outputs = x_MI.shape, codes_OI.shape[0]
    y_MO = torch.empty(rows, outputs, dtype=x_MI.dtype, device=x_MI.device)
    shared = (scale_O if bias_O is None else bias_O, y_MO)
    if rows <= GEMV_ROWS:
        _w8a16_gemv_kernel[(triton.cdiv(outputs, GEMV.block_o), rows)](
            x_MI, codes_OI, scale_O, *shared, outputs, width, x_MI.stride(0),
            bias_O is not None, GEMV.block_o, GEMV.block_i, enable_fp_fusion=True, **_options(GEMV),
        )  # fmt: skip
        return y_MO
    configs = w8a16_configs(x_MI.dtype == torch.float32)
    config = configs[0] if rows <= 16 else configs[-1]
    _w8a16_kernel[grid(rows, outputs, config)](
        x_MI, codes_OI, scale_O, *shared, rows, outputs, width, x_MI.stride(0),
        bias_O is not None, config.block_m, config.block_o, config.block_i, enable_fp_fusion=True, **_options(config),
    )  # fmt: skip
    return y_MO


def int8_linear(
    x_MI: Tensor, codes_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None, outliers: Outliers | None, quantize: bool
) -> Tensor:
    """Both forms of the linear (M, O)."""
    if not len(x_MI) or not len(codes_OI):
        return x_MI.new_empty(len(x_MI), len(codes_OI))
    with launching.on_device_of(x_MI):
        if quantize:
            return w8a8(x_MI, codes_OI, scale_O, bias_O, outliers)
        return w8a16(x_MI, codes_OI, scale_O, bias_O)
