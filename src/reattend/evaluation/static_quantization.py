"""Static 8-bit quantisation per tensor, rounded and given back as numbers (Bondarenko et al., arXiv 2306.12929, 5).

Weights are symmetric by their largest magnitude, activations asymmetric by ranges that were found beforehand.
Computed in fp32 (fp64 for fp64), given back in the input's dtype.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

WEIGHT_CODE_MAX = 127
ACTIVATION_CODE_MAX = 255
MOMENTUM = 0.9
_LEAST_RANGE = 1e-8  # of the paper's code: a tensor of zeros has a scale too


def rounded_weight(weight: Tensor) -> Tensor:
    """Return a weight (any shape) rounded to scale x (-127 .. 127), with scale = absmax / 127."""
    exact = _computed(weight)
    scale = exact.abs().amax().clamp(min=_LEAST_RANGE) / WEIGHT_CODE_MAX
    return (torch.round(exact / scale) * scale).to(weight.dtype)


class ActivationRange:
    """A tensor's static range: running minimum and maximum over calibration windows, then fixed.

    After the first window low and high are 0.9 of what they were and 0.1 of the window's; 0 is always inside.
    """

    def __init__(self) -> None:
        self.low: float | None = None
        self.high: float | None = None

    def see(self, tensors: Iterable[Tensor]) -> None:
        """Take in one window's numbers, as one tensor or several; what is not finite (a mask) is left out."""
        low, high = torch.inf, -torch.inf
        for tensor in tensors:
            finite = torch.isfinite(tensor)
            low = min(low, float(torch.where(finite, tensor, torch.inf).amin()))
            high = max(high, float(torch.where(finite, tensor, -torch.inf).amax()))
        if self.low is None or self.high is None:
            self.low, self.high = low, high
        else:
            self.low = MOMENTUM * self.low + (1 - MOMENTUM) * low
            self.high = MOMENTUM * self.high + (1 - MOMENTUM) * high

    def rounded(self, x: Tensor) -> Tensor:
        """Return `x` (any shape) rounded to scale x (code - zero), codes 0 .. 255, clipped to the range."""
        assert self.low is not None, "no window was seen"
        assert self.high is not None
        return rounded_activation(x, self.low, self.high)


def rounded_activation(x: Tensor, low: float, high: float) -> Tensor:
    """Return `x` (any shape) rounded to 256 levels from `low` to `high`, of which one is 0; -inf and NaN stay."""
    low, high = min(low, 0.0), max(high, _LEAST_RANGE)
    scale = (high - low) / ACTIVATION_CODE_MAX
    zero = min(max(round(-low / scale), 0), ACTIVATION_CODE_MAX)
    codes = torch.round(_computed(x) / scale).clamp_(-zero, ACTIVATION_CODE_MAX - zero)
    return torch.where(x == -torch.inf, x, (codes * scale).to(x.dtype))


def _computed(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
