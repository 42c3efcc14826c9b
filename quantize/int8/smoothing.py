"""SmoothQuant's migration of outliers into weights (arXiv 2211.10438, section 4), with powers of two.

Y = (X / s)(s W)ᵀ for any s > 0 per input channel. Powers of two make both sides exact in every float dtype, so
the migration itself costs nothing and its lossless limit is bit for bit.

Legend: N tokens, I input channels, O output channels.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

_MAX_EXPONENT = 10  # keeps a norm's weight / s far from the bottom of bf16, and of fp16 for weights near 1


def smoothing_factors(absmax_I: Tensor, weight_absmax_I: Tensor, alpha: float) -> Tensor:
    """Return s_I = absmax^alpha / weight_absmax^(1 - alpha) (equation 4), rounded to a power of two; fp32.

    Channels that are zero in the activations or in the weights keep s = 1.
    """
    raw = absmax_I.double().log2() * alpha - weight_absmax_I.double().log2() * (1 - alpha)
    exponent = raw.round().clamp(-_MAX_EXPONENT, _MAX_EXPONENT)
    return torch.exp2(torch.where(torch.isfinite(raw), exponent, torch.zeros_like(raw))).float()


def share(values_I: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Return `values_I` (heads x head_dim) with each channel replaced by the largest of its KV group.

    The output projection's input repeats each value channel over the query heads of a group, so they share s.
    """
    grouped = values_I.reshape(kv_heads, heads // kv_heads, -1)
    return grouped.amax(1, keepdim=True).expand_as(grouped).reshape(-1)


def w8a8_error(x_NI: Tensor, weights_OI: Iterable[Tensor], factors_I: Tensor) -> float:
    """Return the mean over tokens of the relative squared error that W8A8 makes after smoothing by s.

    Per token, so that a token with huge activations counts as one token; a floor of a tenth of the median energy
    keeps silent tokens from dominating.
    """
    error, energy = x_NI.new_zeros(len(x_NI)), x_NI.new_zeros(len(x_NI))
    smoothed = _simulate(x_NI / factors_I)
    for weight_OI in weights_OI:
        exact = x_NI @ weight_OI.T
        error += (smoothed @ _simulate(weight_OI * factors_I).T - exact).square().sum(1)
        energy += exact.square().sum(1)
    return float((error / (energy + 0.1 * energy.median() + torch.finfo(energy.dtype).tiny)).mean())


def _simulate(x: Tensor) -> Tensor:
    """Round every row to int8 codes and back."""
    scale = x.abs().amax(1, keepdim=True) / 127
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (x / scale).round() * scale


def best_factors(
    x_NI: Tensor, weights_OI: list[Tensor], absmax_I: Tensor, weight_absmax_I: Tensor, alphas: Iterable[float]
) -> tuple[float, Tensor]:
    """Return (alpha, s_I) of the smallest `w8a8_error` on `x_NI`; alpha 0 stands for s = 1."""
    ones = torch.ones_like(absmax_I, dtype=torch.float32)
    best = (w8a8_error(x_NI, weights_OI, ones), 0.0, ones)
    for alpha in alphas:
        factors = smoothing_factors(absmax_I, weight_absmax_I, alpha)
        error = w8a8_error(x_NI, weights_OI, factors)
        if error < best[0]:
            best = (error, alpha, factors)
    return best[1], best[2]
