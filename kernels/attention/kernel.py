"""Triton attention of many queries: exact softmax over tiles of keys, without scores in memory.

FlashAttention-2 (Dao, arXiv 2307.08691): a program takes a tile of queries of one head over all keys that they see.
Clipped softmax (Bondarenko et al., arXiv 2306.12929) needs the normaliser first: a pass over the keys alone.
Legend: B batch, H query heads, G key heads, P query heads per key head, S queries, T keys, D head dim, V value dim.
Pointers start with `p_`, offsets with `o_`, masks with `m_`, blocks with `b_`.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from reattend.kernels.attention import kernel_tiles as tiles
from reattend.kernels.attention.options import Options

_LOG2E = tl.constexpr(tiles.LOG2E)


class Config(NamedTuple):
    """One shipped tile: block sizes (queries or rows, keys) and launch options."""

    block_m: int
    block_t: int
    num_warps: int
    num_stages: int
    registers: int | None = None  # that a thread may use; None: as ptxas thinks best, if need be on the stack

    def launch(self) -> dict[str, Any]:
        """Return the options of a launch."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.registers}
        return {"enable_fp_fusion": True, **options}


_ROOMY = Config(128, 64, 8, 3)
_TIGHT = Config(128, 32, 8, 3)
_WIDE = Config(128, 32, 8, 2)
_FP32 = Config(32, 16, 8, 2, 255)  # fp32 products run on the scalar units: registers bound the tile
_WIDEST = 128  # values that a program takes: two share a wider row, and both compute its scores


@triton.jit
def _forward_kernel(
    p_q, p_k, p_v, p_out, p_lse, p_ranges, p_slopes, p_sinks, p_gamma, scale, cap, zeta, window, P, S, T,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kg, stride_kt, stride_vb, stride_vg, stride_vt,
    CAUSAL: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    V: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    D_TAIL: tl.constexpr = D1 + D2 > D
    V_TAIL: tl.constexpr = PARTS * (V1 + V2) > V
    i_part, i_m = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS
    H, i_h, i_b = tl.num_programs(1), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    # Causal: the last queries see the most keys, so their programs start first.
    row = (tl.num_programs(0) // PARTS - 1 - i_m) * BLOCK_M
    column = i_part * (V1 + V2)
    first, end, offset = tiles.range_of(p_ranges, i_b, S, T)
    o_m, o_tile = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_T)
    m_m = row + o_m < S
    o_pos = offset + row + o_m
    o_first, o_last = tiles.bounds_of(o_pos, first, end, window, CAUSAL)
    slope = None
    if p_slopes is not None:
        slope = tl.load(p_slopes + i_h) * _LOG2E
    p_q += i_b * stride_qb + i_h * stride_qh + tl.cast(row, tl.int64) * stride_qs
    p_k += i_b * stride_kb + (i_h // P) * stride_kg
    p_v += i_b * stride_vb + (i_h // P) * stride_vg + column
    q = tiles.load_rows(p_q, o_m * stride_qs, m_m, D, D1, D2, True, D_TAIL)
    last_position = offset + tl.minimum(row + BLOCK_M, S) - 1
    lo, hi, full_lo, full_hi = tiles.keys_of(first, end, offset + row, last_position, window, CAUSAL)
    left, full, masked = tiles.tiles_of(lo, hi, full_lo, full_hi, BLOCK_T)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tiles.zero_rows(BLOCK_M, V1, V2)
    for MASKED in tl.static_range(2):
        for i in range(0, masked if MASKED else full):
            start = tiles.tile_start(i, lo, left, full, MASKED, BLOCK_T)
            o_t = start + o_tile
            p_tile = p_k + tl.cast(start, tl.int64) * stride_kt
            k = tiles.load_rows(p_tile, o_tile * stride_kt, o_t < end, D, D1, D2, MASKED, D_TAIL)
            score = tiles.scores(tiles.dot_rows(q, k, D2), o_pos[:, None], o_t[None, :], scale, cap, slope)[0]
            if MASKED:
                score = tiles.hide(score, o_t[None, :], o_first[:, None], o_last[:, None], window is not None)
            new_top = tl.maximum(top, tl.max(score, 1))
            base = new_top
            if MASKED:
                base = tl.where(new_top == float("-inf"), 0.0, new_top)  # rows that have seen no key yet
            shrink = tl.exp2(top - base)
            weight = tl.exp2(score - base[:, None])
            total = total * shrink + tl.sum(weight, 1)
            top = new_top
            if p_gamma is None:
                p_tile = p_v + tl.cast(start, tl.int64) * stride_vt
                v = tiles.load_rows(p_tile, o_tile * stride_vt, o_t < end, V - column, V1, V2, MASKED, V_TAIL)
                acc = tiles.mix_rows(weight, v, tiles.scale_rows(acc, shrink[:, None], V2), V2)
    lse = top + tl.log2(total)
    if p_gamma is not None:
        gamma = tl.load(p_gamma + i_h)
        gamma = tl.where(gamma > 0, float("nan"), gamma)  # tiles that add something would be skipped
        # A key's weight is 0 up to this score, and a tile without a higher one adds nothing.
        least = tl.log2(-gamma / (zeta - gamma))
        base = tl.where(lse == float("-inf"), 0.0, lse)
        for MASKED in tl.static_range(2):
            for i in range(0, masked if MASKED else full):
                start = tiles.tile_start(i, lo, left, full, MASKED, BLOCK_T)
                o_t = start + o_tile
                p_tile = p_k + tl.cast(start, tl.int64) * stride_kt
                k = tiles.load_rows(p_tile, o_tile * stride_kt, o_t < end, D, D1, D2, MASKED, D_TAIL)
                score = tiles.scores(tiles.dot_rows(q, k, D2), o_pos[:, None], o_t[None, :], scale, cap, slope)[0]
                if MASKED:
                    score = tiles.hide(score, o_t[None, :], o_first[:, None], o_last[:, None], window is not None)
                score -= base[:, None]
                if tl.max(tl.max(score, 1), 0) > least:
                    p_tile = p_v + tl.cast(start, tl.int64) * stride_vt
                    v = tiles.load_rows(p_tile, o_tile * stride_vt, o_t < end, V - column, V1, V2, MASKED, V_TAIL)
                    weight = (zeta - gamma) * tl.exp2(score) + gamma
                    acc = tiles.mix_rows(tl.minimum(tl.maximum(weight, 0.0), 1.0), v, acc, V2)
        poison = lse + gamma  # the clip made 0 of NaN
        acc = tiles.scale_rows(acc, tl.where(poison == poison, 1.0, poison)[:, None], V2)
    else:
        share = 1.0 / tl.where(total == 0, 1.0, total)
        if p_sinks is not None:
            joint = tiles.with_sink(lse, tl.load(p_sinks + i_h) * _LOG2E)
            share *= tl.exp2(lse - tl.where(joint == float("-inf"), 0.0, joint))
            lse = joint
        acc = tiles.scale_rows(acc, share[:, None], V2)
    if i_part == 0:
        tl.store(p_lse + (i_b * H + i_h) * S + row + o_m, lse / _LOG2E, mask=m_m)
    p_out += ((i_b * S + row) * H + i_h) * V + column
    tiles.store_rows(p_out, o_m * (H * V), m_m, acc, V - column, V1, V2)


def value_parts(wide: int) -> tuple[int, int]:
    """Return how many programs share a row of values, and how many values each takes."""
    parts = int(triton.cdiv(wide, _WIDEST))
    return parts, 16 * int(triton.cdiv(wide, 16 * parts))


def config_for(query_BHSD: Tensor, value_BGTV: Tensor, options: Options) -> Config:
    """Return the tile for tensors and options like these."""
    widths = {query_BHSD.shape[3], value_parts(value_BGTV.shape[3])[1]}
    if query_BHSD.dtype == torch.float32:
        return _FP32
    if max(widths) > _WIDEST:
        return _WIDE
    roomy = options.softcap is None and options.slopes is None and not options.is_clipped
    return _ROOMY if roomy and widths <= {64, 128} else _TIGHT


def forward(query_BHSD: Tensor, key_BGTD: Tensor, value_BGTV: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Return `attention_with_lse` of the package; last dimensions contiguous. The output lies as (B, S, H, V)."""
    (batch, heads, queries, width), (groups, tokens, wide) = query_BHSD.shape, value_BGTV.shape[1:]
    dtype, device = query_BHSD.dtype, query_BHSD.device
    output = torch.empty(batch, queries, heads, wide, dtype=dtype, device=device).transpose(1, 2)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=device)
    config, (parts, share) = config_for(query_BHSD, value_BGTV, options), value_parts(wide)
    per_head = (tiles.floats(options.slopes, lse), tiles.floats(options.sinks, lse), tiles.gammas(options, lse))
    _forward_kernel[(parts * triton.cdiv(queries, config.block_m), heads, batch)](
        query_BHSD, key_BGTD, value_BGTV, output, lse, tiles.ranges(options, lse), *per_head,
        *tiles.scales(options, width), float(options.zeta), tiles.window(options), heads // groups, queries, tokens,
        *query_BHSD.stride()[:3], *key_BGTD.stride()[:3], *value_BGTV.stride()[:3],
        options.causal, width, *tiles.chunks(width), wide, *tiles.chunks(share), parts, config.block_m,
        config.block_t, **config.launch(),
    )  # fmt: skip
    return output, lse
