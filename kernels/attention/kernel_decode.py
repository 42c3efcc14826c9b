"""Triton attention of few queries over many keys: each program takes a part of the keys, a second kernel merges.

FlashDecoding's split (Dao et al., 2023): one program would leave the GPU idle. The query heads that share a key head
are rows of one tile, so keys and values are read once for all of them.
Legend: as in `kernel`; M rows, queries x query heads of a key head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from reattend.kernels.attention import kernel_tiles as tiles
from reattend.kernels.attention.kernel import Config
from reattend.kernels.attention.options import Options

_LOG2E = tl.constexpr(tiles.LOG2E)
_PROGRAMS = 256  # that a launch is split into at least, where keys suffice: about two for each unit of a large GPU
_QUERIES = 16  # of more, a tile of `kernel` is as good

# Up to a width (the wider of D and V, in chunks): for at most 16 rows, for more, and for fp32.
CONFIGS = {
    64: (Config(16, 64, 4, 3), Config(64, 64, 4, 2), Config(16, 32, 4, 2)),
    128: (Config(16, 64, 4, 3), Config(64, 32, 4, 2, 255), Config(32, 16, 8, 2, 168)),
    256: (Config(16, 32, 8, 3), Config(32, 32, 4, 3, 255), Config(32, 16, 8, 2, 168)),
}
MERGE = Config(16, 1, 4, 2)  # parts at a time


@triton.jit
def _part_kernel(
    p_q, p_k, p_v, p_part, p_part_lse, p_ranges, p_slopes, scale, cap, window, P, S, T, parts,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kg, stride_kt, stride_vb, stride_vg, stride_vt,
    CAUSAL: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    V: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    D_TAIL: tl.constexpr = D1 + D2 > D
    V_TAIL: tl.constexpr = V1 + V2 > V
    i_part, row = tl.program_id(0) % parts, tl.program_id(0) // parts * BLOCK_M
    i_g, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_m, o_tile = row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_T)
    m_m = o_m < S * P
    o_s, o_h = o_m // P, i_g * P + o_m % P
    first, end, offset = tiles.range_of(p_ranges, i_b, S, T)
    o_pos = offset + o_s
    o_first, o_last = tiles.bounds_of(o_pos, first, end, window, CAUSAL)
    slope = None
    if p_slopes is not None:
        slope = (tl.load(p_slopes + o_h, mask=m_m, other=0.0) * _LOG2E)[:, None]
    o_row = o_h * stride_qh + o_s * tl.cast(stride_qs, tl.int64)
    q = tiles.load_rows(p_q + i_b * stride_qb, o_row, m_m, D, D1, D2, True, D_TAIL)
    p_k += i_b * stride_kb + i_g * stride_kg
    p_v += i_b * stride_vb + i_g * stride_vg
    last_position = offset + tl.minimum((row + BLOCK_M - 1) // P, S - 1)
    keys = tiles.keys_of(first, end, offset + row // P, last_position, window, CAUSAL)
    lo, hi = keys[0], keys[1]
    # This sequence's own keys are split, so that parts are alike whatever the range.
    per_part = tl.cdiv(tl.cdiv(tl.maximum(hi - lo, 0), BLOCK_T), parts) * BLOCK_T
    begin = lo + i_part * per_part
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tiles.zero_rows(BLOCK_M, V1, V2)
    for start in range(begin, tl.minimum(begin + per_part, hi), BLOCK_T):
        o_t = start + o_tile
        p_tile = p_k + tl.cast(start, tl.int64) * stride_kt
        k = tiles.load_rows(p_tile, o_tile * stride_kt, o_t < end, D, D1, D2, True, D_TAIL)
        score = tiles.scores(tiles.dot_rows(q, k, D2), o_pos[:, None], o_t[None, :], scale, cap, slope)[0]
        score = tiles.hide(score, o_t[None, :], o_first[:, None], o_last[:, None], window is not None)
        new_top = tl.maximum(top, tl.max(score, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp2(top - base)
        weight = tl.exp2(score - base[:, None])
        total = total * shrink + tl.sum(weight, 1)
        top = new_top
        p_tile = p_v + tl.cast(start, tl.int64) * stride_vt
        v = tiles.load_rows(p_tile, o_tile * stride_vt, o_t < end, V, V1, V2, True, V_TAIL)
        acc = tiles.mix_rows(weight, v, tiles.scale_rows(acc, shrink[:, None], V2), V2)
    p_part_lse += ((i_b * tl.num_programs(1) + i_g) * parts + i_part) * S * P
    p_part += ((i_b * tl.num_programs(1) + i_g) * parts + i_part) * S * P * V
    tl.store(p_part_lse + o_m, top + tl.log2(total), mask=m_m)
    tiles.store_rows(
        p_part, o_m * V, m_m, tiles.scale_rows(acc, (1.0 / tl.where(total == 0, 1.0, total))[:, None], V2), V, V1, V2
    )


@triton.jit
def _merge_kernel(
    p_part, p_part_lse, p_out, p_lse, p_sinks, P, S, parts, V, BLOCK_P: tl.constexpr, BLOCK_V: tl.constexpr
):  # fmt: skip
    i_m, i_g, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_p, o_v = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_V)
    i_s, i_h, H = i_m // P, i_g * P + i_m % P, tl.num_programs(1) * P
    row = (i_b * tl.num_programs(1) + i_g) * parts * S * P + i_m
    tops = tl.full([BLOCK_P], float("-inf"), tl.float32)
    for start in range(0, parts, BLOCK_P):
        p_lses = p_part_lse + row + (start + o_p) * S * P
        tops = tl.maximum(tops, tl.load(p_lses, mask=start + o_p < parts, other=float("-inf")))
    top = tl.max(tops, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    totals = tl.zeros([BLOCK_P], tl.float32)
    acc = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, parts, BLOCK_P):
        m_p = start + o_p < parts
        o_row = row + (start + o_p) * S * P
        weight = tl.exp2(tl.load(p_part_lse + o_row, mask=m_p, other=float("-inf")) - base)
        totals += weight
        p_rows = p_part + o_row[:, None] * V + o_v[None, :]
        b_part = tl.load(p_rows, mask=m_p[:, None] & (o_v < V)[None, :], other=0.0)
        acc += tl.sum(weight[:, None] * b_part, 0)
    total = tl.sum(totals, 0)
    lse = base + tl.log2(total)
    share = 1.0 / tl.where(total == 0, 1.0, total)
    if p_sinks is not None:
        joint = tiles.with_sink(lse, tl.load(p_sinks + i_h) * _LOG2E)
        share *= tl.exp2(lse - tl.where(joint == float("-inf"), 0.0, joint))
        lse = joint
    tl.store(p_lse + (i_b * H + i_h) * S + i_s, lse / _LOG2E)
    p_row = p_out + ((i_b * S + i_s) * H + i_h) * V + o_v
    tl.store(p_row, (acc * share).to(p_out.dtype.element_ty), mask=o_v < V)


def fits(query_BHSD: Tensor, options: Options) -> bool:
    """Whether these are few queries; clipped softmax needs the normaliser of all parts first."""
    return query_BHSD.shape[2] <= _QUERIES and not options.is_clipped


def config_for(rows: int, width: int, dtype: torch.dtype) -> Config:
    """Return the tile for this many rows of a key head, in tiles of this width."""
    few, many, single = next(three for limit, three in CONFIGS.items() if width <= limit)
    if dtype == torch.float32:
        return single
    return few if rows <= few.block_m else many


def _parts(keys: int, programs: int, config: Config) -> int:
    """Return how many parts keys are split into, so that there are programs for the whole GPU."""
    return min(int(triton.cdiv(keys, config.block_t)), int(triton.cdiv(_PROGRAMS, programs)))


def decode(query_BHSD: Tensor, key_BGTD: Tensor, value_BGTV: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Return `attention_with_lse` of the package; last dimensions contiguous. The output lies as (B, S, H, V)."""
    (batch, heads, queries, width), (groups, tokens, wide) = query_BHSD.shape, value_BGTV.shape[1:]
    per_key, dtype, device = heads // groups, query_BHSD.dtype, query_BHSD.device
    rows = queries * per_key
    config = config_for(rows, max(tiles.padded(width), tiles.padded(wide)), dtype)
    blocks = int(triton.cdiv(rows, config.block_m))
    keys = tokens if options.window is None else min(tokens, options.window + queries - 1)
    parts = _parts(keys, blocks * groups * batch, config)
    part = torch.empty(batch, groups, parts, rows, wide, dtype=torch.float32, device=device)
    part_lse = torch.empty(batch, groups, parts, rows, dtype=torch.float32, device=device)
    output = torch.empty(batch, queries, heads, wide, dtype=dtype, device=device).transpose(1, 2)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=device)
    _part_kernel[(parts * blocks, groups, batch)](
        query_BHSD, key_BGTD, value_BGTV, part, part_lse, tiles.ranges(options, lse),
        tiles.floats(options.slopes, lse), *tiles.scales(options, width), tiles.window(options), per_key, queries,
        tokens, parts,
        *query_BHSD.stride()[:3], *key_BGTD.stride()[:3], *value_BGTV.stride()[:3],
        options.causal, width, *tiles.chunks(width), wide, *tiles.chunks(wide), config.block_m, config.block_t,
        **config.launch(),
    )  # fmt: skip
    _merge_kernel[(rows, groups, batch)](
        part, part_lse, output, lse, tiles.floats(options.sinks, lse), per_key, queries, parts, wide,
        MERGE.block_m, max(16, triton.next_power_of_2(wide)), **MERGE.launch(),
    )  # fmt: skip
    return output, lse
