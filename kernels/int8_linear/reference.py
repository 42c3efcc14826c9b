"""The specification of int8 linears in plain torch, in fp64 after the quantisation; every route is tested on it.

LLM.int8() (Dettmers et al., arXiv 2208.07339): vector-wise quantisation, section 2.1; decomposition, section 3.
Legend: M rows (tokens), I input channels, O output channels, N outlier columns.
"""

from typing import NamedTuple

import torch
from torch import Tensor

CODE_MAX = 127
# A row below this is taken as zero: 127 / absmax would overflow near the smallest fp32 numbers.
ZERO_ROW = 1e-30


class Outliers(NamedTuple):
    """Input columns that are multiplied in floating point.

    `columns` (N,) int64, ascending and unique; `weight` (O, N), any float dtype.
    """

    columns: Tensor
    weight: Tensor


def quantize_rows(x_MI: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantise each row of `x_MI` (M, I), any float dtype, to int8 codes (M, I) and fp32 scales (M,).

    codes = round-half-even(x * (127 / absmax)) in fp32, scale = absmax / 127. Outlier `columns` (N,) get
    the code 0 and do not count in the absmax. A zero row has the scale 0; a row with NaN or inf, NaN.
    """
    x = x_MI.float()
    if columns is not None:
        x = x.index_fill(1, columns, 0.0)
    absmax = x.abs().amax(1)
    absmax = torch.where(absmax < ZERO_ROW, 0.0, absmax)
    absmax = torch.where(absmax.isfinite(), absmax, torch.nan)
    # A tensor: with a number, torch would multiply by a reciprocal, and round twice where the kernels round once.
    code_max = torch.full_like(absmax, CODE_MAX)
    inverse = torch.where(absmax > 0, code_max / absmax, 0.0)
    codes = (x * inverse[:, None]).round().nan_to_num(0.0, 0.0, 0.0)
    return codes.to(torch.int8), absmax / code_max


def outlier_columns(x_MI: Tensor, threshold: float) -> Tensor:
    """Return the columns (N,) where any row's magnitude reaches `threshold` (>=, as bitsandbytes decides)."""
    return (x_MI.abs() >= threshold).any(0).nonzero().flatten()


def dynamic_outliers(x_MI: Tensor, codes_OI: Tensor, scale_O: Tensor, threshold: float) -> Outliers:
    """Return the outlier columns of this batch with their dequantised weights (there is no float copy)."""
    columns = outlier_columns(x_MI, threshold)
    return Outliers(columns, codes_OI[:, columns].float() * scale_O[:, None])


def w8a8(
    x_MI: Tensor, codes_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None = None, outliers: Outliers | None = None
) -> Tensor:
    """Return x @ W^T + bias (M, O) in x's dtype: int8 activations, exact sums, outliers in floating point."""
    x_codes, x_scale = quantize_rows(x_MI, None if outliers is None else outliers.columns)
    exact = x_codes.double() @ codes_OI.double().T  # below 2^53, so no sum is rounded
    y = exact * x_scale.double()[:, None] * scale_O.double()
    if outliers is not None:
        y = y + x_MI[:, outliers.columns].double() @ outliers.weight.double().T
    return _finish(y, bias_O, x_MI.dtype)


def w8a16(x_MI: Tensor, codes_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Return x @ W^T + bias (M, O) in x's dtype: weights alone are quantised."""
    return _finish(x_MI.double() @ codes_OI.double().T * scale_O.double(), bias_O, x_MI.dtype)


def _finish(y_MO: Tensor, bias_O: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (y_MO if bias_O is None else y_MO + bias_O.double()).to(dtype)
