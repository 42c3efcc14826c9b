"""Triton linear on a dictionary: each tile of the weight is added up from atoms in registers, and never stored.

y = (sum_s c_s D_s) x + up h + bias, with h = down x, which is small and comes from a product before.
Legend: M rows (tokens), I input channels, O output channels, S atoms, R rank. Pointers start with `p_`, offsets with
`o_`, masks with `m_`, blocks with `b_`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from reattend.kernels import launching
from reattend.kernels.output_tiles import Config, grid, output_tile, store_output

# Few rows leave the tensor cores idle; fp32 products run on the scalar units. `tests/kernels/test_compile.py`
# compiles all.
SMALL = Config(16, 64, 64, 4, 3)
LARGE = Config(128, 128, 32, 8, 3)
FP32 = Config(32, 64, 16, 4, 2)


@triton.jit
def _dictionary_kernel(
    p_x, p_atoms, p_c, p_h, p_up, p_bias, p_y, M, O, I, R, S, stride_x, stride_s,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    o_m, o_o = output_tile(M, O, BLOCK_M, BLOCK_O, 8)
    m_m, m_o = o_m < M, o_o < O
    y = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
    for start in range(0, I, BLOCK_I):
        o_i = start + tl.arange(0, BLOCK_I)
        m_i = o_i < I
        b_x = tl.load(p_x + o_m[:, None] * stride_x + o_i[None, :], mask=m_m[:, None] & m_i[None, :], other=0.0)
        b_w = tl.zeros([BLOCK_I, BLOCK_O], tl.float32)
        p_w = p_atoms + o_o[None, :] * I + o_i[:, None]
        for s in range(0, S):
            atom = tl.load(p_w, mask=m_o[None, :] & m_i[:, None], other=0.0)
            b_w += tl.load(p_c + s).to(tl.float32) * atom.to(tl.float32)
            p_w += stride_s
        y = tl.dot(b_x, b_w.to(b_x.dtype), y, input_precision="ieee")
    for start in range(0, R, BLOCK_I):
        o_r = start + tl.arange(0, BLOCK_I)
        m_r = o_r < R
        b_h = tl.load(p_h + o_m[:, None] * R + o_r[None, :], mask=m_m[:, None] & m_r[None, :], other=0.0)
        b_u = tl.load(p_up + o_o[None, :] * R + o_r[:, None], mask=m_o[None, :] & m_r[:, None], other=0.0)
        y = tl.dot(b_h, b_u, y, input_precision="ieee")
    store_output(y, p_bias, p_y, o_m, o_o, M, O, HAS_BIAS)


def configs(dtype: torch.dtype) -> tuple[Config, ...]:
    """Return the tiles shipped for a dtype, for few rows and for many."""
    return (FP32,) if dtype == torch.float32 else (SMALL, LARGE)


def dictionary_linear(
    x_MI: Tensor, up_OR: Tensor, down_RI: Tensor, atoms_SOI: Tensor, coefficients_S: Tensor, bias_O: Tensor | None
) -> Tensor:
    """See `dictionary_linear` of the package."""
    (rows, width), outputs, rank = x_MI.shape, up_OR.shape[0], up_OR.shape[1]
    y_MO = torch.empty(rows, outputs, dtype=x_MI.dtype, device=x_MI.device)
    if not y_MO.numel():
        return y_MO
    h_MR = (x_MI @ down_RI.T).contiguous()
    config = configs(x_MI.dtype)[0 if rows <= SMALL.block_m else -1]
    with launching.on_device_of(x_MI):
        _dictionary_kernel[grid(rows, outputs, config)](
            x_MI, atoms_SOI, coefficients_S, h_MR, up_OR, up_OR if bias_O is None else bias_O, y_MO,
            rows, outputs, width, rank, len(atoms_SOI), x_MI.stride(0), atoms_SOI.stride(0), bias_O is not None,
            config.block_m, config.block_o, config.block_i, enable_fp_fusion=True,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return y_MO
