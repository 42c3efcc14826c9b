"""Triton attention on int8 queries and keys: exact sums of codes, softmax in fp32, values in 16 or 8 bits.

SageAttention, arXiv 2410.02367, algorithm 1; SageAttention2, arXiv 2411.10958, section 3.3 (fp8 values). An fp8
product on tensor cores keeps fewer bits than fp32: each tile's starts from zero and is added in fp32. The fp16
accumulators of SageAttention and SageAttention2++ (arXiv 2505.21136) overflow on large values, and aren't used.

Legend: as in `kernel_quantize`.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from reattend.kernels import launching
from reattend.kernels.attention import Options
from reattend.kernels.attention.kernel_tiles import keys_of, tile_start, tiles_of
from reattend.kernels.attention_int8 import kernel_quantize as quantize
from reattend.kernels.attention_int8.formulas import E4M3_MAX, KEY_BLOCK, Quantization

_KEY_BLOCK = tl.constexpr(KEY_BLOCK)
_LOG2_E4M3_MAX = tl.constexpr(math.log2(E4M3_MAX))
_LN2 = tl.constexpr(math.log(2))
_WIDEST = 256


class Config(NamedTuple):
    """One shipped tile: block sizes (queries, keys: 64 or a part of that) and launch options."""

    block_m: int
    block_t: int
    num_warps: int
    num_stages: int


# Up to a width (the wider of D and V, padded): values of 16 bits, of 8, fp32.
CONFIGS = {
    64: (Config(128, 64, 8, 3), Config(128, 64, 8, 3), Config(64, 64, 4, 2)),
    128: (Config(128, 64, 8, 3), Config(128, 64, 8, 3), Config(64, 32, 8, 2)),
    256: (Config(64, 32, 8, 3), Config(64, 64, 8, 2), Config(32, 32, 8, 2)),
}
# Compute capability 12 runs out of registers with 64 keys: both sums, a tile's and the total, take 64 each.
FP8_128_ON_12 = Config(128, 32, 8, 4)


@triton.jit
def _load_rows(p_rows, o_row, m_row, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, MASKED: tl.constexpr):
    o_w = tl.arange(0, BLOCK_W)
    p_tile = p_rows + o_row[:, None] + o_w[None, :]
    if MASKED:
        rows = tl.load(p_tile, mask=m_row[:, None] & (o_w < WIDTH)[None, :], other=0)
    elif WIDTH < BLOCK_W:
        rows = tl.load(p_tile, mask=(o_w < WIDTH)[None, :], other=0)
    else:
        rows = tl.load(p_tile)
    return rows


@triton.jit
def _load_values(
    p_v, start, n, stride_vt, FP8: tl.constexpr, V: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    o_tile, o_v = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_V)
    if FP8:
        # Blocks of keys, channel by channel and padded with zeros: nothing to mask.
        p_tile = p_v + tl.cast(start // _KEY_BLOCK, tl.int64) * (BLOCK_V * _KEY_BLOCK) + start % _KEY_BLOCK
        v = tl.load(p_tile + o_tile[:, None] + o_v[None, :] * _KEY_BLOCK)
    else:
        p_tile = p_v + tl.cast(start, tl.int64) * stride_vt
        v = _load_rows(p_tile, o_tile * stride_vt, start + o_tile < n, V, BLOCK_V, MASKED)
    return v


@triton.jit
def _forward_kernel(
    p_q, p_q_scale, p_shift, p_k, p_k_scale, p_v, p_v_scale, p_v_mean, p_out, p_lse, p_ranges, S, T, window,
    CAUSAL: tl.constexpr, P, stride_vb, stride_vg, stride_vt, V_PACKED: tl.constexpr, PER_TOKEN: tl.constexpr,
    V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    FP8: tl.constexpr = p_v_scale is not None
    # Causal: the last queries see the most keys, so their programs start first.
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    H, i_h, i_b = tl.num_programs(1), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_kv = i_b * (H // P) + i_h // P
    first, n, offset = quantize.seen(p_ranges, i_b, S, T, window, CAUSAL)
    o_m, o_tile = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_T)
    m_m = row + o_m < S
    o_pos = offset + row + o_m
    o_last = o_pos * 0 + n - 1
    if CAUSAL:
        o_last = tl.minimum(o_pos, o_last)
    o_row = (i_b * H + i_h) * S + row
    q = _load_rows(p_q + o_row * BLOCK_D, o_m * BLOCK_D, m_m, BLOCK_D, BLOCK_D, True)
    q_scale = tl.load(p_q_scale + o_row + o_m, mask=m_m, other=0.0)
    p_k += i_kv * T * BLOCK_D
    p_k_scale += i_kv * (T if PER_TOKEN else tl.cdiv(T, _KEY_BLOCK))
    if FP8:
        p_v += i_kv * BLOCK_V * (tl.cdiv(T, _KEY_BLOCK) * _KEY_BLOCK)
        p_v_scale += i_kv * V
    else:
        p_v += i_b * stride_vb + (i_h // P) * stride_vg
        if not V_PACKED:
            p_v += tl.cast(first, tl.int64) * stride_vt
    if p_v_mean is not None:
        p_v_mean += i_kv * V
    lo, hi, full_lo, full_hi = keys_of(0, n, offset + row, offset + tl.minimum(row + BLOCK_M, S) - 1, window, CAUSAL)
    lo = lo // BLOCK_T * BLOCK_T  # no tile lies in two blocks of keys
    left, full, masked = tiles_of(lo, hi, full_lo, full_hi, BLOCK_T)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for MASKED in tl.static_range(2):
        for i in range(0, masked if MASKED else full):
            start = tile_start(i, lo, left, full, MASKED, BLOCK_T)
            o_t = start + o_tile
            p_tile = p_k + tl.cast(start, tl.int64) * BLOCK_D
            k = _load_rows(p_tile, o_tile * BLOCK_D, o_t < n, BLOCK_D, BLOCK_D, MASKED)
            score = tl.dot(q, tl.trans(k), out_dtype=tl.int32).to(tl.float32)
            if PER_TOKEN:
                score *= tl.load(p_k_scale + o_t, mask=o_t < n, other=0.0)[None, :]
                scale = q_scale
            else:
                scale = q_scale * tl.load(p_k_scale + start // _KEY_BLOCK)
            if MASKED:
                m_seen = o_t[None, :] <= o_last[:, None]
                if window is not None:
                    m_seen = m_seen & (o_t[None, :] > (o_pos - window)[:, None])
                score = tl.where(m_seen, score * scale[:, None], float("-inf"))
                peak = tl.max(score, 1)
            else:
                peak = tl.max(score, 1) * scale  # scales aren't negative
            if FP8:
                peak -= _LOG2_E4M3_MAX  # weights of up to 448, the whole range of e4m3; `total` has the factor too
            new_top = tl.maximum(top, peak)
            if MASKED:
                base = tl.where(new_top == float("-inf"), 0.0, new_top)  # rows that have seen no key yet
                weight = tl.exp2(score - base[:, None])
            else:
                base = new_top
                weight = tl.exp2(score * scale[:, None] - base[:, None])
            shrink = tl.exp2(top - base)
            total = total * shrink + tl.sum(weight, 1)
            top = new_top
            v = _load_values(p_v, start, n, stride_vt, FP8, V, BLOCK_T, BLOCK_V, MASKED)
            acc *= shrink[:, None]
            if FP8:
                acc += tl.dot(weight.to(v.dtype), v, max_num_imprecise_acc=BLOCK_T)
            else:
                acc = tl.dot(weight.to(v.dtype), v, acc, input_precision="tf32")
    is_empty = total == 0
    share = 1.0 / tl.where(is_empty, 1.0, total)
    lse = (top + tl.log2(total)) * _LN2
    if p_shift is not None:
        lse = tl.where(is_empty, float("-inf"), lse + tl.load(p_shift + o_row + o_m, mask=m_m, other=0.0))
    tl.store(p_lse + o_row + o_m, lse, mask=m_m)
    acc *= share[:, None]
    o_v = tl.arange(0, BLOCK_V)
    if p_v_scale is not None:
        acc *= tl.load(p_v_scale + o_v, mask=o_v < V, other=0.0)[None, :]
    if p_v_mean is not None:
        mean = tl.load(p_v_mean + o_v, mask=o_v < V, other=0.0)[None, :]
        acc = tl.where(is_empty[:, None], 0.0, acc + mean)
    p_rows = p_out + ((i_b * S + row) * H + i_h) * V + (o_m * (H * V))[:, None]
    tl.store(p_rows + o_v[None, :], acc.to(p_out.dtype.element_ty), mask=m_m[:, None] & (o_v < V)[None, :])


def config_for(width: int, dtype: torch.dtype, how: Quantization, major: int) -> Config:
    """Return the tile for D and V of up to `width`, padded, on GPUs of compute capability `major`."""
    limit, (half, eight, single) = next(item for item in CONFIGS.items() if width <= item[0])
    if how.values == "fp8":
        return FP8_128_ON_12 if limit == 128 and major >= 12 else eight
    return single if dtype == torch.float32 else half


def unfit(query: Tensor, key: Tensor, value: Tensor, how: Quantization) -> str | None:
    """Return why this kernel can't do a call, or None."""
    if how.is_simulated:
        return "4 bits and smooth_q are simulated, by the reference alone"
    if max(query.shape[3], value.shape[3]) > _WIDEST:
        return f"heads are wider than {_WIDEST}"
    if max(query.shape[:2]) > launching.MOST_PROGRAMS:
        return f"there are more than {launching.MOST_PROGRAMS} sequences or heads"
    if not query.is_cuda:
        if not triton.knobs.runtime.interpret:
            return f"tensors are on {query.device.type}"
        is_right = how.values != "fp8" and query.dtype != torch.bfloat16
        return None if is_right else "Triton's interpreter gets e4m3 and bf16 wrong"
    if torch.version.hip is not None:
        return "its tiles are made for NVIDIA GPUs"
    needed = (8, 9) if how.values == "fp8" else (8, 0)
    if torch.cuda.get_device_capability(query.device) < needed:
        return f"the GPU's compute capability is below {needed[0]}.{needed[1]}"
    return None


def attention(
    query_BHSD: Tensor, key_BGTD: Tensor, value_BGTV: Tensor, options: Options, how: Quantization
) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, S, V), which lies as (B, S, H, V), and the log-sum-exp (B, H, S) in fp32; no sinks."""
    with launching.on_device_of(query_BHSD):
        query, key, value = map(launching.readable, (query_BHSD, key_BGTD, value_BGTV))
        return _attention(query, key, value, options, how)


def _attention(
    query_BHSD: Tensor, key_BGTD: Tensor, value_BGTV: Tensor, options: Options, how: Quantization
) -> tuple[Tensor, Tensor]:
    (batch, heads, queries, width), groups, wide = query_BHSD.shape, key_BGTD.shape[1], value_BGTV.shape[3]
    bounds = quantize.sight(query_BHSD, key_BGTD, options)
    mean = quantize.columns(key_BGTD, bounds, True, False)[0] if how.smooth_k else None
    codes, scales, shift = quantize.queries(query_BHSD, mean, groups, options.scale_for(width))
    v_packed, v_mean, v_scale = _values(value_BGTV, bounds, how)
    output = torch.empty(batch, queries, heads, wide, dtype=query_BHSD.dtype, device=query_BHSD.device)
    lse = torch.empty_like(scales)
    block_d, block_v = quantize.padded(width), quantize.padded(wide)
    major = torch.cuda.get_device_capability(query_BHSD.device)[0] if query_BHSD.is_cuda else 0
    config = config_for(max(block_d, block_v), query_BHSD.dtype, how, major)
    v = value_BGTV if v_packed is None else v_packed
    _forward_kernel[(triton.cdiv(queries, config.block_m), heads, batch)](
        codes, scales, shift, *quantize.keys(key_BGTD, mean, bounds, how), v, v_scale, v_mean, output, lse, *bounds,
        heads // groups, *v.stride()[:3], v_packed is not None, how.key_scales == "token", wide,
        config.block_m, config.block_t, block_d, block_v, enable_fp_fusion=True,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return output.transpose(1, 2), lse


def _values(
    value_BGTV: Tensor, bounds: quantize.Sight, how: Quantization
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return packed values, their mean and their scale; values that nothing is done to are read where they are."""
    fp8 = how.values == "fp8"
    if not fp8 and not how.smooth_v:
        return None, None, None
    mean, scale = quantize.columns(value_BGTV, bounds, how.smooth_v, fp8)
    return quantize.values(value_BGTV, mean, scale, bounds), mean, scale
