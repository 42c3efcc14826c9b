"""Error-compensated rounding: the weights not yet rounded make up for the errors of those that are.

GPTQ (arXiv 2210.17323, section 3; the recursion is Optimal Brain Surgeon's), with the scales of plain rounding.

Legend: I input channels, O output channels.
"""

import torch
from torch import Tensor

from reattend.quantize.int8.formulas import CODE_MAX

_BLOCK = 128  # columns whose updates are gathered before the rest of the matrix takes them: section 3.3, step 2


def compensated_codes(w_OI: Tensor, scale_O1: Tensor, moment_II: Tensor, damping: float = 0.01) -> Tensor:
    """Return int8 codes (O, I) in [-127, 127] of `w_OI` that keep W x close for x of second moment E[x xᵀ].

    `damping` times the mean diagonal is added to the moment (section 3.3, step 3). Columns are rounded in the order
    of falling energy. Everything is computed in fp64.
    """
    order_I = moment_II.diagonal().argsort(descending=True, stable=True)
    left_OI = w_OI.double()[:, order_I]
    factor_II = _inverse_factor(moment_II.double()[order_I][:, order_I], damping)
    scale_O = scale_O1.double().flatten()
    codes_OI = torch.empty_like(left_OI)
    for start in range(0, len(order_I), _BLOCK):
        stop = min(start + _BLOCK, len(order_I))
        errors = _round_block(
            left_OI[:, start:stop], codes_OI[:, start:stop], scale_O, factor_II[start:stop, start:stop]
        )
        left_OI[:, stop:] -= errors @ factor_II[start:stop, stop:]
    found = torch.empty(w_OI.shape, dtype=torch.int8, device=w_OI.device)
    found[:, order_I] = codes_OI.to(torch.int8)
    return found


def _round_block(left: Tensor, codes: Tensor, scale_O: Tensor, factor: Tensor) -> Tensor:
    """Round the columns of one block into `codes`, updating those of the block; return the errors (O, block)."""
    errors = torch.empty_like(left)
    for k in range(left.shape[1]):
        codes[:, k] = (left[:, k] / scale_O).round().clamp(-CODE_MAX, CODE_MAX)
        errors[:, k] = (left[:, k] - codes[:, k] * scale_O) / factor[k, k]
        left[:, k:] -= errors[:, k, None] * factor[k, k:]
    return errors


def _inverse_factor(moment_II: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the damped moment's inverse; changes the moment. Zeros count as the identity."""
    mean = moment_II.diagonal().mean()
    moment_II.diagonal().add_(torch.where(mean > 0, damping * mean, torch.ones_like(mean)))
    moment_II = torch.linalg.cholesky(moment_II)  # each of these is I x I: none is kept for longer than needed
    moment_II = torch.cholesky_inverse(moment_II)
    factor_II: Tensor = torch.linalg.cholesky(moment_II, upper=True)
    return factor_II
