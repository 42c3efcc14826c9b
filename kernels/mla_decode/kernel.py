"""Triton MLA decode: each program takes a part of the tokens once for a block of rows; a second kernel merges.

FlashDecoding's split (Dao et al., 2023) with one key-value head. A latent tile is key and value at once.
Legend: B batch, M rows (heads x queries), S queries, T tokens, L latent rank, R rotary numbers, P parts of the
tokens. Pointers start with `p_`, offsets with `o_`, masks with `m_`, blocks with `b_`.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from reattend.kernels import launching

_LOG2E = math.log2(math.e)
_HIDDEN = tl.constexpr(-1e30)  # finite: a row that sees nothing gives a mean, as on the other routes
_PROGRAMS = 256  # that a launch is split into at least, where tokens suffice: about two for each unit of a large GPU


class Config(NamedTuple):
    """One shipped tile: block sizes (M, T) and launch options."""

    block_m: int
    block_t: int
    num_warps: int
    num_stages: int


# Up to a latent rank (padded to a power of two): for at most 16 rows, for more.
CONFIGS = {
    128: (Config(16, 64, 4, 3), Config(64, 32, 8, 2)),
    256: (Config(16, 32, 4, 3), Config(32, 32, 4, 2)),
    512: (Config(16, 16, 8, 2), Config(32, 16, 8, 2)),
}


@triton.jit
def _part_kernel(
    p_q, p_qr, p_c, p_k, p_mask, p_part, p_lse, M, S, T, L, R, scale, tokens_per_part,
    stride_cb, stride_ct, stride_kb, stride_kt, stride_mb, stride_ms, stride_mt,
    HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # Sequences lie along the first axis: it alone takes more than 65535 programs.
    blocks = tl.cdiv(M, BLOCK_M)
    i_p, i_b = tl.program_id(1), (tl.program_id(0) // blocks).to(tl.int64)
    o_m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    o_l, o_r = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_R)
    m_m, m_l, m_r = o_m < M, o_l < L, o_r < R
    o_row = i_b * M + o_m
    b_q = tl.load(p_q + o_row[:, None] * L + o_l[None, :], mask=m_m[:, None] & m_l[None, :], other=0.0)
    b_qr = tl.load(p_qr + o_row[:, None] * R + o_r[None, :], mask=m_m[:, None] & m_r[None, :], other=0.0)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_L], tl.float32)
    first = i_p * tokens_per_part
    last = tl.minimum(first + tokens_per_part, T)
    for start in range(first, last, BLOCK_T):
        o_t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        m_t = o_t < last
        p_rows = p_c + i_b * stride_cb + o_t[:, None] * stride_ct + o_l[None, :]
        b_c = tl.load(p_rows, mask=m_t[:, None] & m_l[None, :], other=0.0)
        p_rows = p_k + i_b * stride_kb + o_t[:, None] * stride_kt + o_r[None, :]
        b_k = tl.load(p_rows, mask=m_t[:, None] & m_r[None, :], other=0.0)
        score = tl.dot(b_qr, tl.trans(b_k), tl.dot(b_q, tl.trans(b_c))) * scale
        if HAS_MASK:
            p_seen = p_mask + i_b * stride_mb + (o_m % S).to(tl.int64)[:, None] * stride_ms + o_t[None, :] * stride_mt
            b_seen = tl.load(p_seen, mask=m_m[:, None] & m_t[None, :], other=0)
            score = tl.where(b_seen != 0, score, _HIDDEN)
        score = tl.where(m_t[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, axis=1))
        shrink = tl.exp2(top - new_top)
        weight = tl.exp2(score - new_top[:, None])
        total = total * shrink + tl.sum(weight, axis=1)
        acc = tl.dot(weight.to(b_c.dtype), b_c, acc * shrink[:, None])
        top = new_top
    o_part = (i_b * tl.num_programs(1) + i_p) * M + o_m
    tl.store(p_part + o_part[:, None] * L + o_l[None, :], acc / total[:, None], mask=m_m[:, None] & m_l[None, :])
    tl.store(p_lse + o_part, top + tl.log2(total), mask=m_m)


@triton.jit
def _merge_kernel(p_part, p_lse, p_out, M, L, P, BLOCK_L: tl.constexpr):
    o_m, i_b = tl.program_id(0) % M, (tl.program_id(0) // M).to(tl.int64)
    o_l = tl.arange(0, BLOCK_L)
    top = tl.load(p_lse + i_b * P * M + o_m)
    for i_p in range(1, P):
        top = tl.maximum(top, tl.load(p_lse + (i_b * P + i_p) * M + o_m))
    total = top * 0.0
    acc = tl.zeros([BLOCK_L], tl.float32)
    for i_p in range(0, P):
        o_part = (i_b * P + i_p) * M + o_m
        weight = tl.exp2(tl.load(p_lse + o_part) - top)
        total += weight
        acc += weight * tl.load(p_part + o_part * L + o_l, mask=o_l < L, other=0.0)
    tl.store(p_out + (i_b * M + o_m) * L + o_l, (acc / total).to(p_out.dtype.element_ty), mask=o_l < L)


def config_for(rows: int, rank: int) -> Config:
    """Return the tile for this many rows of a sequence."""
    few, many = next(pair for limit, pair in CONFIGS.items() if rank <= limit)
    return few if rows <= few.block_m else many


def _tokens_per_part(tokens: int, blocks: int, config: Config) -> int:
    """Split tokens so that there are programs for the whole GPU: whole tiles, nearly alike."""
    tiles = triton.cdiv(tokens, config.block_t)
    parts = min(tiles, triton.cdiv(_PROGRAMS, blocks))
    return config.block_t * int(triton.cdiv(tiles, parts))


def mla_decode(
    query_latent_BHSL: Tensor, query_rope_BHSR: Tensor, latent_BTL: Tensor, rope_BTR: Tensor, scale: float,
    mask: Tensor | None,
) -> Tensor:  # fmt: skip
    """See `mla_decode` of the package; 16-bit tensors, `mask` bool."""
    q, qr = query_latent_BHSL.contiguous(), query_rope_BHSR.contiguous()
    batch, heads, queries, rank = q.shape
    rows, (tokens, rope) = heads * queries, rope_BTR.shape[1:]
    config = config_for(rows, rank)
    blocks = triton.cdiv(rows, config.block_m)
    per_part = _tokens_per_part(tokens, blocks * batch, config)
    parts = triton.cdiv(tokens, per_part)
    part = q.new_empty(batch, parts, rows, rank, dtype=torch.float32)
    lse, out = part.new_empty(batch, parts, rows), torch.empty_like(q)
    seen = None if mask is None else mask.expand(batch, 1, queries, tokens)[:, 0].view(torch.int8)
    block_l = max(16, triton.next_power_of_2(rank))
    with launching.on_device_of(q):
        _part_kernel[(blocks * batch, parts)](
            q, qr, latent_BTL, rope_BTR, q if seen is None else seen, part, lse, rows, queries, tokens, rank, rope,
            scale * _LOG2E, per_part, *latent_BTL.stride()[:2], *rope_BTR.stride()[:2],
            *((0, 0, 0) if seen is None else seen.stride()), seen is not None, config.block_m, config.block_t,
            block_l, max(16, triton.next_power_of_2(rope)), enable_fp_fusion=True,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        _merge_kernel[(rows * batch,)](part, lse, out, rows, rank, parts, block_l, enable_fp_fusion=True, num_warps=4)
    return out
