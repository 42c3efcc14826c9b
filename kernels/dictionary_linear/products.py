"""A linear on a dictionary by torch: the atoms are added up to a weight for the time of the call."""

import torch
from torch import Tensor
from torch.nn.functional import linear


def dictionary_linear(
    x_MI: Tensor, up_OR: Tensor, down_RI: Tensor, atoms_SOI: Tensor, coefficients_S: Tensor, bias_O: Tensor | None
) -> Tensor:
    """See `dictionary_linear` of the package."""
    weight_OI = torch.tensordot(coefficients_S, atoms_SOI, 1)
    return linear(x_MI, weight_OI, bias_O) + linear(linear(x_MI, down_RI), up_OR)
