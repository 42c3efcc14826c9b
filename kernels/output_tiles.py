"""Tiles of a linear layer's output in Triton: their sizes, which program makes which, and storing one.

Legend: M rows (tokens), O output channels, I input channels.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Config(NamedTuple):
    """One shipped tile: block sizes (M, O, I) and launch options."""

    block_m: int
    block_o: int
    block_i: int
    num_warps: int
    num_stages: int


def grid(rows: int, outputs: int, config: Config) -> tuple[int]:
    """Return how many programs make all tiles of an output (M, O)."""
    return (triton.cdiv(rows, config.block_m) * triton.cdiv(outputs, config.block_o),)


@triton.jit
def output_tile(M, O, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, GROUP: tl.constexpr):
    """Return the rows (BLOCK_M,) and outputs (BLOCK_O,) of this program's tile, int64."""
    # Row tiles in groups, so that neighbours in time share weight tiles in the second-level cache.
    i = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    per_group = GROUP * tl.cdiv(O, BLOCK_O)
    first = (i // per_group) * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    i_m, i_o = first + (i % per_group) % size, (i % per_group) // size
    o_m = (i_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_o = (i_o * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)
    return o_m, o_o


@triton.jit
def store_output(y, p_bias, p_y, o_m, o_o, M, O, HAS_BIAS: tl.constexpr):
    """Add the bias (O,) to a tile, fp32, and store it in the output's dtype (M, O)."""
    if HAS_BIAS:
        y += tl.load(p_bias + o_o, mask=o_o < O, other=0.0).to(tl.float32)[None, :]
    m_y = (o_m < M)[:, None] & (o_o < O)[None, :]
    tl.store(p_y + o_m[:, None] * O + o_o[None, :], y.to(p_y.dtype.element_ty), mask=m_y)
