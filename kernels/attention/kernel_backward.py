"""Gradients of the Triton attention: scores are computed again from the saved log-sum-exps.

FlashAttention-2 (Dao, arXiv 2307.08691): one kernel over tiles of queries, one over tiles of keys that takes all
queries of all its heads, so that nothing is added up in an order that changes.
Legend: as in `kernel`; a leading d marks the gradient of what follows. delta: a row's sum of weight x its gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from reattend.kernels import launching
from reattend.kernels.attention import kernel_tiles as tiles
from reattend.kernels.attention.kernel import Config
from reattend.kernels.attention.options import Options

_LOG2E = tl.constexpr(tiles.LOG2E)

_QUERIES, _QUERIES_FP32 = Config(128, 32, 8, 2), Config(32, 16, 8, 1, 255)
_KEYS, _KEYS_FP32 = Config(32, 128, 8, 2), Config(16, 32, 8, 1, 168)
# Up to a width (the wider of D and V, in chunks): of queries' gradients in 16 bits and fp32, of keys' likewise.
CONFIGS = {
    32: (Config(64, 32, 4, 2), _QUERIES_FP32, _KEYS, _KEYS_FP32),
    128: (_QUERIES, _QUERIES_FP32, _KEYS, _KEYS_FP32),
    256: (Config(32, 64, 8, 1), Config(16, 16, 8, 1, 255), Config(32, 32, 8, 1), Config(16, 16, 8, 1, 168)),
}


@triton.jit
def _row_dot(a, b, C2: tl.constexpr):
    product = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    if C2 > 0:
        product += tl.sum(a[1].to(tl.float32) * b[1].to(tl.float32), 1)
    return product


@triton.jit
def _clip(weight, d_clipped, gamma, zeta):
    # What clipped softmax makes of weights, and their gradient from its own.
    stretched = (zeta - gamma) * weight + gamma
    # Without a zeta nothing is cut off above: a weight of 1 is rounded to either side, here and in the other kernel.
    m_inside = (stretched > 0) & ((stretched < 1) | (zeta == 1))
    d_weight = tl.where(m_inside, (zeta - gamma) * d_clipped, 0.0)
    return tl.minimum(tl.maximum(stretched, 0.0), 1.0), d_weight


@triton.jit
def _load_lse(p_lse, m_row):
    # Infinite for rows that see no key, and for those that don't exist: their weights are then 0 without a mask.
    lse = tl.load(p_lse, mask=m_row, other=float("inf")) * _LOG2E
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def _query_kernel(
    p_q, p_k, p_v, p_out, p_dout, p_lse, p_dlse, p_delta, p_dq, p_ranges, p_slopes, p_gamma,
    scale, cap, factor, zeta, window, P, S, T,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kg, stride_kt, stride_vb, stride_vg, stride_vt,
    stride_ob, stride_oh, stride_os,
    CAUSAL: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    V: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    D_TAIL: tl.constexpr = D1 + D2 > D
    V_TAIL: tl.constexpr = V1 + V2 > V
    PASSES: tl.constexpr = 1 if p_gamma is None else 2
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    H, i_h, i_b = tl.num_programs(1), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    first, end, offset = tiles.range_of(p_ranges, i_b, S, T)
    o_m, o_tile = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_T)
    m_m = row + o_m < S
    o_pos = offset + row + o_m
    o_first, o_last = tiles.bounds_of(o_pos, first, end, window, CAUSAL)
    slope = None
    if p_slopes is not None:
        slope = tl.load(p_slopes + i_h) * _LOG2E
    p_q += i_b * stride_qb + i_h * stride_qh + tl.cast(row, tl.int64) * stride_qs
    p_dout += i_b * stride_ob + i_h * stride_oh + tl.cast(row, tl.int64) * stride_os
    p_k += i_b * stride_kb + (i_h // P) * stride_kg
    p_v += i_b * stride_vb + (i_h // P) * stride_vg
    q = tiles.load_rows(p_q, o_m * stride_qs, m_m, D, D1, D2, True, D_TAIL)
    dout = tiles.load_rows(p_dout, o_m * stride_os, m_m, V, V1, V2, True, V_TAIL)
    o_lse = (i_b * H + i_h) * S + row + o_m
    lse = _load_lse(p_lse + o_lse, m_m)
    delta = tl.zeros([BLOCK_M], tl.float32)
    if p_dlse is not None:
        delta -= tl.load(p_dlse + o_lse, mask=m_m, other=0.0)
    if p_gamma is None:
        out = tiles.load_rows(p_out + ((i_b * S + row) * H + i_h) * V, o_m * (H * V), m_m, V, V1, V2, True, V_TAIL)
        delta += _row_dot(out, dout, V2)
    last_position = offset + tl.minimum(row + BLOCK_M, S) - 1
    lo, hi, full_lo, full_hi = tiles.keys_of(first, end, offset + row, last_position, window, CAUSAL)
    left, full, masked = tiles.tiles_of(lo, hi, full_lo, full_hi, BLOCK_T)
    dq = tiles.zero_rows(BLOCK_M, D1, D2)
    for PASS in tl.static_range(PASSES):
        for MASKED in tl.static_range(2):
            for i in range(0, masked if MASKED else full):
                start = tiles.tile_start(i, lo, left, full, MASKED, BLOCK_T)
                o_t = start + o_tile
                p_tile = p_k + tl.cast(start, tl.int64) * stride_kt
                k = tiles.load_rows(p_tile, o_tile * stride_kt, o_t < end, D, D1, D2, MASKED, D_TAIL)
                p_tile = p_v + tl.cast(start, tl.int64) * stride_vt
                v = tiles.load_rows(p_tile, o_tile * stride_vt, o_t < end, V, V1, V2, MASKED, V_TAIL)
                score, bend = tiles.scores(tiles.dot_rows(q, k, D2), o_pos[:, None], o_t[None, :], scale, cap, slope)
                if MASKED:
                    score = tiles.hide(score, o_t[None, :], o_first[:, None], o_last[:, None], window is not None)
                weight = tl.exp2(score - lse[:, None])
                d_weight = tiles.dot_rows(dout, v, V2)
                if p_gamma is not None:
                    d_weight = _clip(weight, d_weight, tl.load(p_gamma + i_h), zeta)[1]
                if PASS == PASSES - 1:
                    dq = tiles.mix_rows(weight * (d_weight - delta[:, None]) * bend, k, dq, D2)
                else:
                    delta += tl.sum(weight * d_weight, 1)
    tl.store(p_delta + o_lse, delta, mask=m_m)
    tiles.store_rows(
        p_dq + ((i_b * H + i_h) * S + row) * D, o_m * D, m_m, tiles.scale_rows(dq, factor, D2), D, D1, D2
    )


@triton.jit
def _key_kernel(
    p_q, p_k, p_v, p_dout, p_lse, p_delta, p_dk, p_dv, p_ranges, p_slopes, p_gamma,
    scale, cap, factor, zeta, window, P, S, T,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kg, stride_kt, stride_vb, stride_vg, stride_vt,
    stride_ob, stride_oh, stride_os,
    CAUSAL: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    V: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    D_TAIL: tl.constexpr = D1 + D2 > D
    V_TAIL: tl.constexpr = V1 + V2 > V
    start_t = tl.program_id(0) * BLOCK_T
    G, i_g, i_b = tl.num_programs(1), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    first, end, offset = tiles.range_of(p_ranges, i_b, S, T)
    o_tile, o_m = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_M)
    o_t = start_t + o_tile
    m_t = (o_t >= first) & (o_t < end)
    p_k += i_b * stride_kb + i_g * stride_kg + tl.cast(start_t, tl.int64) * stride_kt
    p_v += i_b * stride_vb + i_g * stride_vg + tl.cast(start_t, tl.int64) * stride_vt
    k = tiles.load_rows(p_k, o_tile * stride_kt, m_t, D, D1, D2, True, D_TAIL)
    if p_dk is not None:
        v = tiles.load_rows(p_v, o_tile * stride_vt, m_t, V, V1, V2, True, V_TAIL)
    # The queries that see any of these keys, and those that see all of them: none if some are out of range.
    lo, hi = 0, S
    if CAUSAL:
        lo = tl.maximum(tl.maximum(start_t, first) - offset, 0)
    full_lo, full_hi = lo, S
    if CAUSAL:
        full_lo = tl.maximum(start_t + BLOCK_T - 1 - offset, 0)
    if window is not None:
        hi = tl.minimum(S, tl.minimum(start_t + BLOCK_T, end) - 1 + window - offset)
        full_hi = tl.minimum(S, start_t + window - offset)
    hi = tl.where((start_t + BLOCK_T > first) & (start_t < end), hi, 0)
    full_hi = tl.where((start_t >= first) & (start_t + BLOCK_T <= end), full_hi, 0)
    left, full, masked = tiles.tiles_of(lo, hi, full_lo, full_hi, BLOCK_M)
    dk = tiles.zero_rows(BLOCK_T, D1, D2)
    dv = tiles.zero_rows(BLOCK_T, V1, V2)
    for i_p in range(0, P):
        i_h = i_g * P + i_p
        slope = None
        if p_slopes is not None:
            slope = tl.load(p_slopes + i_h) * _LOG2E
        p_qh = p_q + i_b * stride_qb + i_h * stride_qh
        p_doh = p_dout + i_b * stride_ob + i_h * stride_oh
        for MASKED in tl.static_range(2):
            for i in range(0, masked if MASKED else full):
                row = tiles.tile_start(i, lo, left, full, MASKED, BLOCK_M)
                m_m = row + o_m < S
                o_pos = offset + row + o_m
                p_tile = p_qh + tl.cast(row, tl.int64) * stride_qs
                q = tiles.load_rows(p_tile, o_m * stride_qs, m_m, D, D1, D2, MASKED, D_TAIL)
                p_tile = p_doh + tl.cast(row, tl.int64) * stride_os
                dout = tiles.load_rows(p_tile, o_m * stride_os, m_m, V, V1, V2, MASKED, V_TAIL)
                o_lse = (i_b * G * P + i_h) * S + row + o_m
                lse = _load_lse(p_lse + o_lse, m_m)
                score, bend = tiles.scores(tiles.dot_rows(k, q, D2), o_pos[None, :], o_t[:, None], scale, cap, slope)
                if MASKED:
                    o_first, o_last = tiles.bounds_of(o_pos, first, end, window, CAUSAL)
                    score = tiles.hide(score, o_t[:, None], o_first[None, :], o_last[None, :], True)
                weight = tl.exp2(score - lse[None, :])
                if p_dv is not None:
                    mixed = weight
                    if p_gamma is not None:
                        mixed = _clip(weight, weight, tl.load(p_gamma + i_h), zeta)[0]
                    dv = tiles.mix_rows(mixed, dout, dv, V2)
                if p_dk is not None:
                    d_weight = tiles.dot_rows(v, dout, V2)
                    if p_gamma is not None:
                        d_weight = _clip(weight, d_weight, tl.load(p_gamma + i_h), zeta)[1]
                    delta = tl.load(p_delta + o_lse, mask=m_m, other=0.0)
                    dk = tiles.mix_rows(weight * (d_weight - delta[None, :]) * bend, q, dk, D2)
    row = (i_b * G + i_g) * T + start_t
    if p_dk is not None:
        tiles.store_rows(p_dk + row * D, o_tile * D, o_t < T, tiles.scale_rows(dk, factor, D2), D, D1, D2)
    if p_dv is not None:
        tiles.store_rows(p_dv + row * V, o_tile * V, o_t < T, dv, V, V1, V2)


def configs_for(width: int, dtype: torch.dtype, has_tail: bool) -> tuple[Config, Config, Config]:
    """Return the tiles of queries', keys' and values' gradients, for tiles of this width; `has_tail`: wider than V.

    Keys and values have one tile where they are computed together.
    """
    configs = next(four for limit, four in CONFIGS.items() if width <= limit)
    single = dtype == torch.float32
    of_queries, of_keys = configs[single], configs[2 + single]
    if has_tail and is_split(width, dtype):
        return of_queries, of_keys, of_keys._replace(num_stages=1)  # with two, masks of columns end on the stack
    return of_queries, of_keys, of_keys


def is_split(width: int, dtype: torch.dtype) -> bool:
    """Whether gradients of keys and values are computed one after the other, in tiles too large for both."""
    return 64 < width <= 128 and dtype != torch.float32


def backward(
    inputs: tuple[Tensor, Tensor, Tensor], outputs: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor | None], options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of query, key and value, and delta (B, H, S), from those of an output and its log-sum-exp.

    `inputs`: query (B, H, S, D), key (B, G, T, D) and value (B, G, T, V), last dimensions contiguous; `outputs`: what
    `kernel.forward` made of them; `gradients`: of the output (B, H, S, V) and of the log-sum-exp (B, H, S), or None.
    """
    (query, key, value), (output, lse), (d_output, d_lse) = inputs, outputs, gradients
    (batch, heads, queries, width), (groups, tokens, wide) = query.shape, value.shape[1:]
    d_output = launching.readable(d_output)
    d_lse = None if d_lse is None else d_lse.contiguous()
    dq, dk, dv = (torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in inputs)
    delta = torch.empty(lse.shape, dtype=lse.dtype, device=lse.device)
    per_head = (tiles.ranges(options, lse), tiles.floats(options.slopes, lse), tiles.gammas(options, lse))
    numbers = (*tiles.scales(options, width), float(options.scale_for(width)), float(options.zeta))
    strides = tuple(stride for tensor in (*inputs, d_output) for stride in tensor.stride()[:3])
    common = (
        *per_head, *numbers, tiles.window(options), heads // groups, queries, tokens, *strides,
        options.causal, width, *tiles.chunks(width), wide, *tiles.chunks(wide),
    )  # fmt: skip
    padded = max(tiles.padded(width), tiles.padded(wide))
    of_queries, of_keys, of_values = configs_for(padded, query.dtype, tiles.padded(wide) > wide)
    _query_kernel[(triton.cdiv(queries, of_queries.block_m), heads, batch)](
        query, key, value, output, d_output, lse, d_lse, delta, dq, *common, of_queries.block_m, of_queries.block_t,
        **of_queries.launch(),
    )  # fmt: skip
    parts = (
        (((dk, None), of_keys), ((None, dv), of_values)) if is_split(padded, query.dtype) else (((dk, dv), of_keys),)
    )
    for targets, config in parts:
        _key_kernel[(triton.cdiv(tokens, config.block_t), groups, batch)](
            query, key, value, d_output, lse, delta, *targets, *common, config.block_m, config.block_t,
            **config.launch(),
        )  # fmt: skip
    return dq, dk, dv, delta
