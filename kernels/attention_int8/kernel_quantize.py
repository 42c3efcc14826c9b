"""Triton kernels that quantise the operands of attention, as `formulas` does, and how they are launched.

Keys and values are packed: row r of what these kernels write is key first + r, `first` being the first key that some
query of the sequence sees. Rows behind the last such key are never read, and left unwritten.

Legend: as in `formulas`; P query heads per key head, N parts of the keys. Pointers start with `p_`, offsets with
`o_`, masks with `m_`. Arguments that may be None are then absent.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from reattend.kernels.attention import Options
from reattend.kernels.attention.kernel_tiles import keys_of, range_of, ranges, window
from reattend.kernels.attention_int8.formulas import E4M3_MAX, KEY_BLOCK, ZERO, Quantization

# Adding and subtracting 1.5 * 2^23 rounds an fp32 of magnitude below 2^22 half to even.
_ROUND = tl.constexpr(12582912.0)
_E4M3_MAX = tl.constexpr(E4M3_MAX)
_ZERO = tl.constexpr(ZERO)
_CODE_MAX = tl.constexpr(127.0)
_LOG2E = math.log2(math.e)


class Config(NamedTuple):
    """One shipped tile: tokens (or parts of them) and launch options."""

    block_t: int
    num_warps: int
    num_stages: int


QUERIES = Config(32, 4, 1)
KEYS = Config(KEY_BLOCK, 8, 1)
VALUES = Config(KEY_BLOCK, 8, 1)
COLUMNS = Config(32, 4, 2)
MERGE = Config(16, 4, 2)
PART = 512  # keys that one program reduces


class Sight(NamedTuple):
    """What bounds the keys that are seen, in the order in which kernels take it."""

    ranges: Tensor | None
    queries: int
    tokens: int
    window: int | None
    causal: bool


def sight(query_BHSD: Tensor, key_BGTD: Tensor, options: Options) -> Sight:
    """Return what bounds the keys; implied `ranges` stay so, as a tensor of them would be copied from the host."""
    queries, tokens = query_BHSD.shape[2], key_BGTD.shape[2]
    return Sight(ranges(options, key_BGTD), queries, tokens, window(options), options.causal)


@triton.jit
def seen(p_ranges, i_b, S, T, window, CAUSAL: tl.constexpr):
    """Return the first key that some query sees, the number of these, and the first query's place among them."""
    first, end, offset = range_of(p_ranges, i_b, S, T)
    lo, hi, _, _ = keys_of(first, end, offset, offset + S - 1, window, CAUSAL)
    return lo, tl.maximum(hi - lo, 0), offset - lo


@triton.jit
def _quotient(x, y):
    # The compiler's own division may be off by an ulp, and codes with it.
    return tl.where(y == 0, 0.0, tl.div_rn(x, tl.where(y == 0, 1.0, y)))


@triton.jit
def _usable(absmax):
    return tl.where(absmax < _ZERO, 0.0, absmax)


@triton.jit
def _codes(x, absmax):
    x = x * _quotient(tl.full(absmax.shape, _CODE_MAX, tl.float32), absmax)
    x = (x + _ROUND) - _ROUND
    x = tl.where(x == x, x, 0.0)
    return tl.minimum(tl.maximum(x, -_CODE_MAX), _CODE_MAX).to(tl.int8)


@triton.jit
def _scale(absmax, largest):
    return tl.div_rn(absmax, tl.full(absmax.shape, largest, tl.float32))


@triton.jit
def _queries_kernel(
    p_q, p_mean, p_codes, p_scale, p_shift, S, P, stride_qb, stride_qh, stride_qs, factor, scale,
    WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    H, i_h, i_b = tl.num_programs(1), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_s, o_d = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    m_s, m_d = o_s < S, o_d < WIDTH
    p_rows = p_q + i_b * stride_qb + i_h * stride_qh + o_s.to(tl.int64)[:, None] * stride_qs
    x = tl.load(p_rows + o_d[None, :], mask=m_s[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    o_row = (i_b * H + i_h) * S + o_s
    if p_mean is not None:
        mean = tl.load(p_mean + (i_b * (H // P) + i_h // P) * WIDTH + o_d, mask=m_d, other=0.0)
        tl.store(p_shift + o_row, tl.sum(x * mean[None, :], 1) * scale, mask=m_s)
    poison = tl.sum(x * 0.0, 1)  # NaN where x is NaN or inf: max() drops NaN
    x *= factor
    absmax = _usable(tl.max(tl.abs(x), 1))
    tl.store(p_scale + o_row, _scale(absmax, _CODE_MAX) + poison, mask=m_s)
    tl.store(p_codes + o_row[:, None] * BLOCK_D + o_d[None, :], _codes(x, absmax[:, None]), mask=m_s[:, None])


@triton.jit
def _centred(p_rows, p_mean, o_r, n, stride_xt, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    # Whatever lies behind the last key that is seen becomes 0, and so reaches no mean and no scale.
    o_d = tl.arange(0, BLOCK_D)
    m_x = (o_r < n)[:, None] & (o_d < WIDTH)[None, :]
    x = tl.load(p_rows + o_r.to(tl.int64)[:, None] * stride_xt + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
    if p_mean is not None:
        x = tl.where(m_x, x - tl.load(p_mean + o_d, mask=o_d < WIDTH, other=0.0)[None, :], 0.0)
    return x


@triton.jit
def _keys_kernel(
    p_k, p_mean, p_codes, p_scale, p_ranges, S, T, window, CAUSAL: tl.constexpr, stride_kb, stride_kg, stride_kt,
    PER_TOKEN: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_t, i_g, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = i_b * tl.num_programs(1) + i_g
    first, n, _ = seen(p_ranges, i_b, S, T, window, CAUSAL)
    if i_t * BLOCK_T >= n:
        return
    o_r, o_d = i_t * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    p_k += i_b * stride_kb + i_g * stride_kg + tl.cast(first, tl.int64) * stride_kt
    if p_mean is not None:
        p_mean += row * WIDTH
    x = _centred(p_k, p_mean, o_r, n, stride_kt, WIDTH, BLOCK_D)
    poison = tl.sum(x * 0.0, 1)
    absmax = _usable(tl.max(tl.abs(x), 1))
    if PER_TOKEN:
        tl.store(p_scale + row * T + o_r, _scale(absmax, _CODE_MAX) + poison, mask=o_r < n)
    else:
        absmax = tl.zeros_like(absmax) + tl.max(absmax, 0)
        scale = _scale(absmax, _CODE_MAX) + tl.sum(poison, 0)
        tl.store(p_scale + row * tl.num_programs(0) + i_t + o_r * 0, scale, mask=o_r == i_t * BLOCK_T)
    p_rows = p_codes + (row * T + o_r)[:, None] * BLOCK_D
    tl.store(p_rows + o_d[None, :], _codes(x, absmax[:, None]), mask=(o_r < n)[:, None])


@triton.jit
def _values_kernel(
    p_v, p_mean, p_scale, p_codes, p_ranges, S, T, window, CAUSAL: tl.constexpr, stride_vb, stride_vg, stride_vt,
    WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_t, i_g, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = i_b * tl.num_programs(1) + i_g
    first, n, _ = seen(p_ranges, i_b, S, T, window, CAUSAL)
    if i_t * BLOCK_T >= n:
        return
    o_r, o_d = i_t * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    p_v += i_b * stride_vb + i_g * stride_vg + tl.cast(first, tl.int64) * stride_vt
    if p_mean is not None:
        p_mean += row * WIDTH
    x = _centred(p_v, p_mean, o_r, n, stride_vt, WIDTH, BLOCK_D)
    if p_scale is not None:
        # In blocks of keys, keys last: Hopper's tensor cores take 8-bit operands in no other order.
        scale = tl.load(p_scale + row * WIDTH + o_d, mask=o_d < WIDTH, other=0.0)
        x *= _quotient(tl.full(scale.shape, 1.0, tl.float32), scale)[None, :]
        x = tl.trans(tl.minimum(tl.maximum(x, -_E4M3_MAX), _E4M3_MAX))
        p_rows = p_codes + ((row * tl.num_programs(0) + i_t) * BLOCK_D + o_d)[:, None] * BLOCK_T
        tl.store(p_rows + tl.arange(0, BLOCK_T)[None, :], x.to(p_codes.dtype.element_ty))
    else:
        p_rows = p_codes + (row * T + o_r)[:, None] * WIDTH
        m_tile = (o_r < n)[:, None] & (o_d < WIDTH)[None, :]
        tl.store(p_rows + o_d[None, :], x.to(p_codes.dtype.element_ty), mask=m_tile)


@triton.jit
def _columns_kernel(
    p_x, p_part, p_ranges, S, T, window, CAUSAL: tl.constexpr, stride_xb, stride_xg, stride_xt,
    WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_n, i_g, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    first, n, _ = seen(p_ranges, i_b, S, T, window, CAUSAL)
    p_x += i_b * stride_xb + i_g * stride_xg + tl.cast(first, tl.int64) * stride_xt
    total = tl.zeros([BLOCK_D], tl.float32)
    top = tl.full([BLOCK_D], float("-inf"), tl.float32)
    bottom = tl.full([BLOCK_D], float("inf"), tl.float32)
    for start in range(i_n * BLOCK_P, tl.minimum(n, (i_n + 1) * BLOCK_P), BLOCK_T):
        o_r = start + tl.arange(0, BLOCK_T)
        x = _centred(p_x, None, o_r, n, stride_xt, WIDTH, BLOCK_D)
        total += tl.sum(x, 0)
        top = tl.maximum(top, tl.max(tl.where((o_r < n)[:, None], x, float("-inf")), 0))
        bottom = tl.minimum(bottom, tl.min(tl.where((o_r < n)[:, None], x, float("inf")), 0))
    o_d = tl.arange(0, BLOCK_D)
    p_part += ((i_b * tl.num_programs(1) + i_g) * tl.num_programs(0) + i_n) * (3 * BLOCK_D) + o_d
    tl.store(p_part, total)
    tl.store(p_part + BLOCK_D, top)
    tl.store(p_part + 2 * BLOCK_D, bottom)


@triton.jit
def _merge_kernel(
    p_part, p_mean, p_scale, p_ranges, S, T, window, CAUSAL: tl.constexpr, N,
    WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    _, n, _ = seen(p_ranges, tl.program_id(1).to(tl.int64), S, T, window, CAUSAL)
    o_d = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    top = tl.full([BLOCK_D], float("-inf"), tl.float32)
    bottom = tl.full([BLOCK_D], float("inf"), tl.float32)
    for start in range(0, N, BLOCK_T):
        o_n = start + tl.arange(0, BLOCK_T)
        p_rows = p_part + (row * N + o_n)[:, None] * (3 * BLOCK_D) + o_d[None, :]
        m_n = (o_n < N)[:, None]
        total += tl.sum(tl.load(p_rows, mask=m_n, other=0.0), 0)
        top = tl.maximum(top, tl.max(tl.load(p_rows + BLOCK_D, mask=m_n, other=float("-inf")), 0))
        bottom = tl.minimum(bottom, tl.min(tl.load(p_rows + 2 * BLOCK_D, mask=m_n, other=float("inf")), 0))
    mean = tl.zeros_like(total)
    if p_mean is not None:
        mean = tl.div_rn(total, tl.full(total.shape, 0.0, tl.float32) + tl.maximum(n, 1).to(tl.float32))
        tl.store(p_mean + row * WIDTH + o_d, mean, mask=o_d < WIDTH)
    if p_scale is not None:
        # Rounding is monotone: what the extremes become on subtraction bounds what all others do.
        absmax = _usable(tl.where(n > 0, tl.maximum(top - mean, mean - bottom), 0.0))
        tl.store(p_scale + row * WIDTH + o_d, _scale(absmax, _E4M3_MAX) + total * 0.0, mask=o_d < WIDTH)


def padded(width: int) -> int:
    """Return how many channels a tile of `width` has: products of 8-bit numbers take no fewer than 32."""
    return max(32, int(triton.next_power_of_2(width)))


def _launch(config: Config) -> dict[str, Any]:
    # Fused, a product and a rounding would round once where `formulas` rounds twice.
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": False}


def columns(x_BGTD: Tensor, bounds: Sight, mean: bool, scale: bool) -> tuple[Tensor | None, Tensor | None]:
    """Return each channel's mean, and its e4m3 scale around that or 0, (B, G, D): those that are asked for."""
    batch, heads, tokens, width = x_BGTD.shape
    parts, block = int(triton.cdiv(tokens, PART)), padded(width)
    part = torch.empty(batch, heads, parts, 3 * block, dtype=torch.float32, device=x_BGTD.device)
    _columns_kernel[(parts, heads, batch)](
        x_BGTD, part, *bounds, *x_BGTD.stride()[:3], width, PART, COLUMNS.block_t, block, **_launch(COLUMNS)
    )
    means, scales = (part.new_empty(batch, heads, width) if asked else None for asked in (mean, scale))
    _merge_kernel[(heads, batch)](part, means, scales, *bounds, parts, width, MERGE.block_t, block, **_launch(MERGE))
    return means, scales


def queries(
    query_BHSD: Tensor, mean_BGD: Tensor | None, kv_heads: int, scale: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return codes (B, H, S, padded D), scales (B, H, S), and by how much the keys' mean moves scores (B, H, S)."""
    batch, heads, rows, width = query_BHSD.shape
    block = padded(width)
    codes = torch.empty(batch, heads, rows, block, dtype=torch.int8, device=query_BHSD.device)
    scales = torch.empty(batch, heads, rows, dtype=torch.float32, device=query_BHSD.device)
    shift = None if mean_BGD is None else torch.empty_like(scales)
    _queries_kernel[(triton.cdiv(rows, QUERIES.block_t), heads, batch)](
        query_BHSD, mean_BGD, codes, scales, shift, rows, heads // kv_heads, *query_BHSD.stride()[:3],
        scale * _LOG2E, scale, width, QUERIES.block_t, block, **_launch(QUERIES),
    )  # fmt: skip
    return codes, scales, shift


def keys(key_BGTD: Tensor, mean_BGD: Tensor | None, bounds: Sight, how: Quantization) -> tuple[Tensor, Tensor]:
    """Return packed codes (B, G, T, padded D) and scales (B, G, T), or (B, G, blocks of 64 keys)."""
    batch, heads, tokens, width = key_BGTD.shape
    blocks, per_token, device = int(triton.cdiv(tokens, KEY_BLOCK)), how.key_scales == "token", key_BGTD.device
    codes = torch.empty(batch, heads, tokens, padded(width), dtype=torch.int8, device=device)
    scales = torch.empty(batch, heads, tokens if per_token else blocks, dtype=torch.float32, device=device)
    _keys_kernel[(blocks, heads, batch)](
        key_BGTD, mean_BGD, codes, scales, *bounds, *key_BGTD.stride()[:3], per_token, width,
        KEYS.block_t, padded(width), **_launch(KEYS),
    )  # fmt: skip
    return codes, scales


def values(value_BGTV: Tensor, mean_BGV: Tensor | None, scale_BGV: Tensor | None, bounds: Sight) -> Tensor:
    """Return packed values less their mean: in their own dtype (B, G, T, V), or e4m3 (B, G, blocks, padded V, 64)."""
    batch, heads, tokens, width = value_BGTV.shape
    blocks, device = int(triton.cdiv(tokens, KEY_BLOCK)), value_BGTV.device
    if scale_BGV is None:
        codes = torch.empty(batch, heads, tokens, width, dtype=value_BGTV.dtype, device=device)
    else:
        shape = (batch, heads, blocks, padded(width), KEY_BLOCK)
        codes = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
    _values_kernel[(blocks, heads, batch)](
        value_BGTV, mean_BGV, scale_BGV, codes, *bounds, *value_BGTV.stride()[:3], width,
        VALUES.block_t, padded(width), **_launch(VALUES),
    )  # fmt: skip
    return codes
