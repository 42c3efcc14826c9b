"""Pieces that the Triton attention kernels share: tiles of rows, scores, and which keys a query sees.

A tile's width is one power of two or the sum of two, so that heads of 192 numbers don't pay for 256: rows are tuples
of one or two chunks. Scores are in units of log2, for exp2. Scalar arguments that may be None are then absent.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from reattend.kernels.attention.options import Options

LOG2E = math.log2(math.e)
_TWO_LOG2E = tl.constexpr(2 * LOG2E)
_FAR = 1 << 30  # a window that no sequence reaches, and that positions can be added to in int32


def chunks(width: int) -> tuple[int, int]:
    """Return the powers of two that a tile of `width` numbers consists of; the second is 0 where one will do.

    128 is 64 + 64 and 256 is 128 + 128: a smaller operand at a time keeps wide tiles out of the stack. So does at
    least 64 beside 128: Triton lays out tiles that are wider than high, and others, differently.
    """
    if width > 128:
        return 128, 64 if width <= 192 else 128
    if width > 64:
        return 64, _power(width - 64)
    whole = _power(width)
    rest = _power(width - whole // 2)
    return (whole, 0) if rest >= whole // 2 else (whole // 2, rest)


def _power(width: int) -> int:
    return max(16, int(triton.next_power_of_2(width)))


def padded(width: int) -> int:
    """Return how many numbers wide a tile of `width` is."""
    return sum(chunks(width))


def floats(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    """Return numbers per head as the kernels read them."""
    return None if tensor is None else tensor.detach().to(like.device, torch.float32).contiguous()


def gammas(options: Options, like: Tensor) -> Tensor | None:
    """Return gamma (H,) where the softmax is clipped: zeros where only `zeta` is given."""
    if options.is_clipped and options.gamma is None:
        return torch.zeros(like.shape[1], dtype=torch.float32, device=like.device)
    return floats(options.gamma, like)


def ranges(options: Options, like: Tensor) -> Tensor | None:
    """Return ranges (B, 3) as the kernels read them."""
    return None if options.ranges is None else options.ranges.to(like.device, torch.int32).contiguous()


def window(options: Options) -> int | None:
    """Return the window, bounded."""
    return None if options.window is None else min(options.window, _FAR)


def scales(options: Options, width: int) -> tuple[float, float | None]:
    """Return what q k is multiplied by, and what its tanh then is, where scores are capped."""
    scale = options.scale_for(width)
    if options.softcap is None:
        return scale * LOG2E, None
    return scale / options.softcap, options.softcap * LOG2E


@triton.jit
def load_chunk(
    p_rows, o_row, m_row, o_w, width, ROWS_MASKED: tl.constexpr, WIDTH_MASKED: tl.constexpr
):  # fmt: skip
    """Return columns `o_w` of rows that start at `o_row` behind `p_rows`."""
    p_tile = p_rows + o_row[:, None] + o_w[None, :]
    if ROWS_MASKED and WIDTH_MASKED:
        b = tl.load(p_tile, mask=m_row[:, None] & (o_w < width)[None, :], other=0.0)
    elif WIDTH_MASKED:
        b = tl.load(p_tile, mask=(o_w < width)[None, :], other=0.0)
    elif ROWS_MASKED:
        b = tl.load(p_tile, mask=m_row[:, None], other=0.0)
    else:
        b = tl.load(p_tile)
    return b


@triton.jit
def load_rows(
    p_rows, o_row, m_row, width, C1: tl.constexpr, C2: tl.constexpr, ROWS_MASKED: tl.constexpr,
    WIDTH_MASKED: tl.constexpr,
):  # fmt: skip
    """Return rows of `width` numbers that start at `o_row` behind `p_rows`; `m_row`: those that exist."""
    first = load_chunk(p_rows, o_row, m_row, tl.arange(0, C1), width, ROWS_MASKED, WIDTH_MASKED)
    if C2 > 0:
        return first, load_chunk(p_rows, o_row, m_row, C1 + tl.arange(0, C2), width, ROWS_MASKED, WIDTH_MASKED)
    else:
        return (first,)


@triton.jit
def store_rows(p_rows, o_row, m_row, rows, width, C1: tl.constexpr, C2: tl.constexpr):
    """Store rows of `width` numbers that start at `o_row` behind `p_rows`; `m_row`: those that exist."""
    o_w = tl.arange(0, C1)
    m_tile = m_row[:, None] & (o_w < width)[None, :]
    tl.store(p_rows + o_row[:, None] + o_w[None, :], rows[0].to(p_rows.dtype.element_ty), mask=m_tile)
    if C2 > 0:
        o_w = C1 + tl.arange(0, C2)
        m_tile = m_row[:, None] & (o_w < width)[None, :]
        tl.store(p_rows + o_row[:, None] + o_w[None, :], rows[1].to(p_rows.dtype.element_ty), mask=m_tile)


@triton.jit
def zero_rows(ROWS: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr):
    """Return rows of zeros, to add up in."""
    first = tl.zeros([ROWS, C1], tl.float32)
    if C2 > 0:
        return first, tl.zeros([ROWS, C2], tl.float32)
    else:
        return (first,)


@triton.jit
def scale_rows(rows, factor, C2: tl.constexpr):
    """Return rows x factor."""
    if C2 > 0:
        return rows[0] * factor, rows[1] * factor
    else:
        return (rows[0] * factor,)


@triton.jit
def dot_rows(a, b, C2: tl.constexpr):
    """Return a b^T."""
    product = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    if C2 > 0:
        product = tl.dot(a[1], tl.trans(b[1]), product, input_precision="ieee")
    return product


@triton.jit
def mix_rows(weight, rows, acc, C2: tl.constexpr):
    """Return acc + weight rows."""
    first = tl.dot(weight.to(rows[0].dtype), rows[0], acc[0], input_precision="ieee")
    if C2 > 0:
        return first, tl.dot(weight.to(rows[1].dtype), rows[1], acc[1], input_precision="ieee")
    else:
        return (first,)


@triton.jit
def scores(product, o_pos, o_t, scale, cap, slope):
    """Return scores, and what their gradient is multiplied by on its way to that of product x scale."""
    score = product * scale
    bend = 1.0
    if cap is not None:
        bent = 1.0 - 2.0 / (tl.exp2(score * _TWO_LOG2E) + 1.0)  # tanh, from what every target has
        score = cap * bent
        bend = 1.0 - bent * bent
    if slope is not None:
        score -= slope * tl.abs(o_pos - o_t).to(tl.float32)
    return score, bend


@triton.jit
def bounds_of(o_pos, first, end, window, CAUSAL: tl.constexpr):
    """Return the first and the last key that queries at these positions see."""
    o_first = o_pos * 0 + first
    o_last = o_pos * 0 + end - 1
    if CAUSAL:
        o_last = tl.minimum(o_pos, o_last)
    if window is not None:
        o_first = tl.maximum(o_pos - window + 1, o_first)
    return o_first, o_last


@triton.jit
def hide(score, o_t, o_first, o_last, LEFT: tl.constexpr):
    """Return scores, -inf where a query doesn't see a key; LEFT: whether a key may lie before the first."""
    m_seen = o_t <= o_last
    if LEFT:
        m_seen = m_seen & (o_t >= o_first)
    return tl.where(m_seen, score, float("-inf"))


@triton.jit
def range_of(p_ranges, i_b, S, T):
    """Return the first key, the end of keys, and the first query's position among them."""
    first, end, offset = 0, T, T - S
    if p_ranges is not None:
        first = tl.maximum(tl.load(p_ranges + i_b * 3), 0)
        end = tl.minimum(tl.load(p_ranges + i_b * 3 + 1), T)
        offset = tl.load(p_ranges + i_b * 3 + 2)
    return first, end, offset


@triton.jit
def keys_of(first, end, position, last_position, window, CAUSAL: tl.constexpr):
    """Return the keys that queries from one position to another see, and those that all of them see."""
    lo, hi, full_lo, full_hi = first, end, first, end
    if CAUSAL:
        hi = tl.minimum(end, last_position + 1)
        full_hi = tl.minimum(end, position + 1)
    if window is not None:
        lo = tl.maximum(first, position - window + 1)
        full_lo = tl.maximum(first, last_position - window + 1)
    return lo, hi, full_lo, full_hi


@triton.jit
def tiles_of(lo, hi, full_lo, full_hi, BLOCK: tl.constexpr):
    """Return how many tiles from `lo` to `hi` come before the first without a mask, have none, have one."""
    tiles = tl.cdiv(tl.maximum(hi - lo, 0), BLOCK)
    left = tl.minimum(tl.cdiv(tl.maximum(full_lo - lo, 0), BLOCK), tiles)
    full = tl.maximum(full_hi - lo - left * BLOCK, 0) // BLOCK
    return left, full, tiles - full


@triton.jit
def tile_start(i, lo, left, full, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Return where a tile starts; those with a mask lie before and behind those without."""
    before = left
    if MASKED:
        before = tl.where(i >= left, full, 0)
    return lo + (i + before) * BLOCK


@triton.jit
def with_sink(lse, sink):
    """Return log2(2^lse + 2^sink)."""
    top = tl.maximum(lse, sink)
    base = tl.where(top == float("-inf"), 0.0, top)
    return base + tl.log2(tl.exp2(lse - base) + tl.exp2(sink - base))
