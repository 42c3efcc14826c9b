"""Smoothing: activation outliers moved into the weights (SmoothQuant, arXiv 2211.10438), by the least expected error.

Y = (X / s)(s W)ᵀ for any s > 0 per input channel. SmoothQuant's s (section 4, equation 4) is where the search starts;
from there s goes downhill on the error that rounding is expected to make, which is a closed form.

Legend: N tokens, I input channels, O output channels, R channels that have an s of their own (R < I where query
heads share a value channel; `owner_I` names each input channel's).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reattend.quantize.int8.formulas import CODE_MAX, token_weights

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_MAX_EXPONENT = 10.0  # keeps a norm's weight / s far from the bottom of bf16, and of fp16 for weights near 1
_QUIET = 1e-3  # a channel below this share of a token's largest counts as that: unseen tokens may be louder
_STEPS, _RATE = 100, 0.1
_LOUDEST, _REFRESH = 64, 25  # channels per token that descent looks at, and steps after which they are found anew


def smoothing_factors(absmax_I: Tensor, weight_absmax_I: Tensor, alpha: float) -> Tensor:
    """Return s_I = absmax^alpha / weight_absmax^(1 - alpha) (equation 4), fp32.

    Channels that are zero in the activations or in the weights keep s = 1.
    """
    raw = absmax_I.double().log2() * alpha - weight_absmax_I.double().log2() * (1 - alpha)
    exponent = raw.clamp(-_MAX_EXPONENT, _MAX_EXPONENT)
    return torch.exp2(torch.where(torch.isfinite(raw), exponent, torch.zeros_like(raw))).float()


def w8a8_error(x_NI: Tensor, weights_OI: Sequence[Tensor], s_I: Tensor, emphasis_N: Tensor | None = None) -> float:
    """Return the relative squared error that W8A8 with nearest rounding makes after smoothing by s, simulated.

    The mean over tokens (see `token_weights`), each as often as `emphasis_N` says (default: once), and over the
    linears that take `x_NI`.
    """
    often_N = _shares(emphasis_N, x_NI)
    x_NI = x_NI.float()  # squares of what fp16 holds overflow it
    smoothed, total = _simulate(x_NI / s_I), 0.0
    for w_OI in (weight.float() for weight in weights_OI):
        y_NO = x_NI @ w_OI.T
        error_N = (smoothed @ _simulate(w_OI * s_I).T - y_NO).square().sum(1)
        total += float((error_N * token_weights(y_NO) * often_N).sum())
    return total / len(weights_OI)


def _shares(emphasis_N: Tensor | None, x_NI: Tensor) -> Tensor:
    """Return what part of a mean over tokens each one is (N,)."""
    often_N = torch.ones(len(x_NI), device=x_NI.device) if emphasis_N is None else emphasis_N
    return often_N / often_N.sum()


def _simulate(x: Tensor) -> Tensor:
    """Round every row to int8 codes and back."""
    scale = x.abs().amax(1, keepdim=True) / CODE_MAX
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (x / scale).round() * scale


@dataclass(frozen=True)
class WeighedLinear:
    """A linear's part in the expected error."""

    weight_N: Tensor  # of each token
    log_w_OI: Tensor
    gain_I: Tensor  # squared norm of each column: what an error of the activation becomes
    cost_I: Tensor  # weighted second moment of each channel: what an error of the weight becomes


class ExpectedError:
    """The error of W8A8 as a function of s, from rounding alone: an error of a step's size has variance step² / 12.

    A token's step is max_i |x_i| / s_i / 127, a row's is max_i |w_i| s_i / 127. Activation errors reach the output
    through the columns of W, weight errors through the activations; sums over channels replace the simulation.
    """

    def __init__(self, x_NI: Tensor, weights_OI: Sequence[Tensor], emphasis_N: Tensor | None = None) -> None:
        x_NI = x_NI.float()
        quiet = _QUIET * x_NI.abs().amax(1, keepdim=True)
        self._log_x_NI = x_NI.abs().clamp_min(quiet).clamp_min(torch.finfo(torch.float32).tiny).log2()
        self._linears = [weigh_linear(x_NI, weight.float(), emphasis_N) for weight in weights_OI]

    def loudest(self, log_s_I: Tensor) -> Tensor:
        """Return the channels (N, 64 or I) that set each token's range near `log_s_I`: few, so quick to compare."""
        return (self._log_x_NI - log_s_I).topk(min(_LOUDEST, len(log_s_I)), dim=1).indices

    def __call__(self, log_s_I: Tensor, loudest_NK: Tensor | None = None) -> Tensor:
        """Return the expected relative squared error (scalar), differentiable in `log_s_I` = log2 s.

        With `loudest_NK`, tokens' ranges are those of these channels.
        """
        if loudest_NK is None:
            over_s = self._log_x_NI - log_s_I
        else:
            over_s = self._log_x_NI.gather(1, loudest_NK) - log_s_I[loudest_NK]
        range_N = torch.exp2(2 * over_s.amax(1))
        square_I, total = torch.exp2(2 * log_s_I), torch.zeros(())
        for linear in self._linears:
            activations = (range_N @ linear.weight_N) * (square_I @ linear.gain_I)
            weights = torch.exp2(2 * (linear.log_w_OI + log_s_I).amax(1)).sum() * (linear.cost_I / square_I).sum()
            total = total + activations + weights
        return total / (12 * CODE_MAX**2 * len(self._linears))


def weigh_linear(x_NI: Tensor, w_OI: Tensor, emphasis_N: Tensor | None = None) -> WeighedLinear:
    """Return a linear's part in the expected error, from its inputs and weight (fp32)."""
    weight_N = token_weights(x_NI @ w_OI.T) * _shares(emphasis_N, x_NI)
    log_w_OI = w_OI.abs().clamp_min(torch.finfo(torch.float32).tiny).log2()
    return WeighedLinear(weight_N, log_w_OI, w_OI.square().sum(0), weight_N @ x_NI.square())


def descend(error: ExpectedError, start_R: Tensor, owner_I: Tensor) -> Tensor:
    """Return s (R,), downhill from `start_R` on the expected error: Adam on log2 s, its rate falling to 0."""
    with torch.enable_grad():
        log_s_R = start_R.log2().clone().requires_grad_()
        adam = torch.optim.Adam([log_s_R], lr=_RATE)
        for step in range(_STEPS):
            adam.param_groups[0]["lr"] = _RATE * (1 - step / _STEPS)
            adam.zero_grad()
            if step % _REFRESH == 0:
                loudest_NK = error.loudest(log_s_R.detach()[owner_I])
            torch.autograd.backward(error(log_s_R[owner_I], loudest_NK).log())
            adam.step()
    return torch.exp2(log_s_R.detach().clamp(-_MAX_EXPONENT, _MAX_EXPONENT))


def best_factors(
    fit_NI: Tensor, choose_NI: Tensor, weights_OI: Sequence[Tensor], absmax_I: Tensor, owner_I: Tensor,
    emphasis: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, float, float]:  # fmt: skip
    """Return s (R,) and the `w8a8_error` on `choose_NI` with s = 1 and with s.

    `fit_NI` are the inputs that s is fitted to, `absmax_I` their channels' ranges over more tokens; `emphasis` says
    how often each token of both counts (default: once). The candidates (none, SmoothQuant's best alpha, and
    downhill from it) are compared on `choose_NI`, so smoothing never makes things worse there. All must be finite.
    """
    rows = int(owner_I.max()) + 1
    weight_absmax_I = torch.stack([weight.abs().amax(0) for weight in weights_OI]).amax(0)
    absmax_R, weight_absmax_R = (_largest(value, owner_I, rows) for value in (absmax_I, weight_absmax_I))
    error = ExpectedError(fit_NI, weights_OI, emphasis[0])
    published = [smoothing_factors(absmax_R, weight_absmax_R, alpha) for alpha in ALPHAS]
    start = min(published, key=lambda s_R: float(error(s_R[owner_I].log2())))
    ones = torch.ones_like(start)
    measured = [
        (w8a8_error(choose_NI, weights_OI, s_R[owner_I], emphasis[1]), s_R)
        for s_R in (ones, start, descend(error, start, owner_I))
    ]
    least, best = min(measured, key=lambda found: found[0])
    return best, measured[0][0], least


def _largest(values_I: Tensor, owner_I: Tensor, rows: int) -> Tensor:
    """The largest value among the input channels of each owner, (R,)."""
    values = values_I.float()
    return values.new_zeros(rows).scatter_reduce(0, owner_I, values, "amax")
