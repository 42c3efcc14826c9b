"""The Triton route: keys or values are divided among programs, whose parts are then added up.

A leader's program reads a run of keys and values of one group, and writes the scores of the group's heads beside its
part of the output. A follower's reads the scores and its own values.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from reattend.kernels.launching import on_device_of

STAGES = 2
_RUN = 512  # tokens of one program: enough of them for a GPU from a few thousand tokens on


@triton.jit
def _lead_kernel(
    p_q, p_k, p_v, p_mask, p_score, p_part, p_lse,
    scale, groups, per, tokens, run, runs, width, value_width,
    stride_qb, stride_qh, stride_kb, stride_kg, stride_kt, stride_vb, stride_vg, stride_vt,
    stride_mb, stride_mh,
    HAS_MASK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    batch, group, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    heads = groups * per
    p = tl.arange(0, BLOCK_P)
    d = tl.arange(0, BLOCK_D)
    v = tl.arange(0, BLOCK_V)
    head = group * per + p
    q = tl.load(
        p_q + batch * stride_qb + head[:, None] * stride_qh + d[None, :],
        mask=(p[:, None] < per) & (d[None, :] < width), other=0.0,
    )  # fmt: skip
    top = tl.full((BLOCK_P,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_P,), tl.float32)
    found = tl.zeros((BLOCK_P, BLOCK_V), tl.float32)
    first = part * run
    for start in range(first, tl.minimum(first + run, tokens), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = t < tokens
        t64 = t.to(tl.int64)
        k = tl.load(
            p_k + batch * stride_kb + group * stride_kg + t64[None, :] * stride_kt + d[:, None],
            mask=inside[None, :] & (d[:, None] < width), other=0.0,
        )  # fmt: skip
        score = tl.dot(q, k, input_precision="ieee") * scale
        seen = inside[None, :] & (p[:, None] < per)
        if HAS_MASK:
            place = p_mask + batch * stride_mb + head[:, None] * stride_mh + t64[None, :]
            seen &= tl.load(place, mask=seen, other=0) != 0
        score = tl.where(seen, score, -float("inf"))
        tl.store(
            p_score + (batch * heads + head[:, None]) * tokens + t64[None, :], score,
            mask=inside[None, :] & (p[:, None] < per),
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(score, 1))
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        weight = tl.exp(score - safe[:, None])
        shrink = tl.exp(top - safe)
        values = tl.load(
            p_v + batch * stride_vb + group * stride_vg + t64[:, None] * stride_vt + v[None, :],
            mask=inside[:, None] & (v[None, :] < value_width), other=0.0,
        )  # fmt: skip
        found = found * shrink[:, None] + tl.dot(weight.to(values.dtype), values, input_precision="ieee")
        total = total * shrink + tl.sum(weight, 1)
        top = higher
    row = (batch * heads + head) * runs + part
    safe_total = tl.where(total > 0, total, 1.0)
    tl.store(
        p_part + row[:, None] * value_width + v[None, :], found / safe_total[:, None],
        mask=(p[:, None] < per) & (v[None, :] < value_width),
    )  # fmt: skip
    lse = tl.where(total > 0, top + tl.log(safe_total), -float("inf"))
    tl.store(p_lse + row, lse, mask=p < per)


@triton.jit
def _follow_kernel(
    p_score, p_lse, p_v, p_part,
    groups, per, tokens, run, runs, value_width,
    stride_vb, stride_vg, stride_vt,
    BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    batch, group, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    heads = groups * per
    p = tl.arange(0, BLOCK_P)
    v = tl.arange(0, BLOCK_V)
    head = batch * heads + group * per + p
    lse = tl.load(p_lse + head, mask=p < per, other=0.0)
    lse = tl.where(lse == -float("inf"), 0.0, lse)
    found = tl.zeros((BLOCK_P, BLOCK_V), tl.float32)
    first = part * run
    for start in range(first, tl.minimum(first + run, tokens), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = t < tokens
        t64 = t.to(tl.int64)
        score = tl.load(
            p_score + head[:, None] * tokens + t64[None, :],
            mask=inside[None, :] & (p[:, None] < per), other=-float("inf"),
        )  # fmt: skip
        weight = tl.exp(score - lse[:, None])
        values = tl.load(
            p_v + batch * stride_vb + group * stride_vg + t64[:, None] * stride_vt + v[None, :],
            mask=inside[:, None] & (v[None, :] < value_width), other=0.0,
        )  # fmt: skip
        found += tl.dot(weight.to(values.dtype), values, input_precision="ieee")
    tl.store(
        p_part + (head[:, None] * runs + part) * value_width + v[None, :], found,
        mask=(p[:, None] < per) & (v[None, :] < value_width),
    )  # fmt: skip


def blocks(per: int, width: int, value_width: int, itemsize: int) -> dict[str, int]:
    """Return the tile sizes for heads per group and numbers per head: powers of two, as dots take them."""
    sizes = {"BLOCK_P": per, "BLOCK_D": width, "BLOCK_V": value_width}
    tiles = {name: max(16, triton.next_power_of_2(size)) for name, size in sizes.items()}
    wide = max(tiles["BLOCK_D"], tiles["BLOCK_V"]) * itemsize
    return tiles | {"BLOCK_T": 64 if wide <= 256 else 32 if wide <= 512 else 16}  # so that no register spills


def warps(wide: int) -> int:
    """Return the warps of a program whose tiles are `wide` numbers: enough that no register spills."""
    return 8 if wide > 128 else 4


def lead(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output (B, H, 1, V), scores (B, H, T) and log-sum-exp (B, H)."""
    batch, heads, _, width = query.shape
    groups, tokens, value_width = key.shape[1], key.shape[2], value.shape[3]
    query, key, value = (part if part.stride(-1) == 1 else part.contiguous() for part in (query, key, value))
    runs = triton.cdiv(tokens, _RUN)
    sizes = ((batch, heads, tokens), (batch, heads, runs, value_width), (batch, heads, runs))
    score, part, lse = (torch.empty(size, device=query.device, dtype=torch.float32) for size in sizes)
    seen = None if mask is None else mask.expand(batch, heads, 1, tokens)[:, :, 0]
    if seen is not None and seen.stride(-1) != 1:
        seen = seen.contiguous()
    with on_device_of(query):
        _lead_kernel[(batch, groups, runs)](
            query, key, value, query if seen is None else seen.view(torch.int8), score, part, lse,
            scale, groups, heads // groups, tokens, _RUN, runs, width, value_width,
            query.stride(0), query.stride(1), *key.stride()[:3], *value.stride()[:3],
            *((0, 0) if seen is None else seen.stride()[:2]),
            HAS_MASK=seen is not None, **blocks(heads // groups, width, value_width, key.element_size()),
            num_warps=warps(max(width, value_width)), num_stages=STAGES,
        )  # fmt: skip
    whole = lse.logsumexp(-1)
    share = torch.exp(lse - whole.clamp_min(torch.finfo(torch.float32).min)[..., None])
    return (share[..., None] * part).sum(2, keepdim=True).to(query.dtype), score, whole


def follow(score: Tensor, lse: Tensor, value: Tensor) -> Tensor:
    """Return the weights times values (B, H, 1, V)."""
    batch, heads, tokens = score.shape
    groups, value_width = value.shape[1], value.shape[3]
    value = value if value.stride(-1) == 1 else value.contiguous()
    runs = triton.cdiv(tokens, _RUN)
    part = torch.empty(batch, heads, runs, value_width, device=value.device, dtype=torch.float32)
    sizes = blocks(heads // groups, 16, value_width, value.element_size())
    del sizes["BLOCK_D"]
    with on_device_of(value):
        _follow_kernel[(batch, groups, runs)](
            score.contiguous(), lse.contiguous(), value, part,
            groups, heads // groups, tokens, _RUN, runs, value_width, *value.stride()[:3],
            **sizes, num_warps=warps(value_width), num_stages=STAGES,
        )  # fmt: skip
    return part.sum(2, keepdim=True).to(value.dtype)
