"""The Triton route: which kernel takes a call, what none can take, and gradients.

Source of both directions: FlashAttention-2 (Dao, arXiv 2307.08691).
"""

from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from reattend.kernels import launching
from reattend.kernels.attention import kernel, kernel_backward, kernel_decode
from reattend.kernels.attention.options import Options

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_WIDEST = 256
_OLDEST = 8, 0  # compute capability


def unfit(query: Tensor, key: Tensor, value: Tensor, options: Options) -> str | None:
    """Return why this call can't go the Triton route, or None."""
    if options.mask is not None:
        return "the Triton kernels take no mask, only ranges"
    if query.dtype not in _DTYPES:
        return f"tensors are {query.dtype}, not fp32, fp16 or bf16"
    if not 0 < value.shape[3] <= _WIDEST or query.shape[3] > _WIDEST:
        return f"heads are {query.shape[3]} and {value.shape[3]} numbers wide, not 1 to {_WIDEST}"
    if max(query.shape[:2]) > launching.MOST_PROGRAMS:
        return f"there are more than {launching.MOST_PROGRAMS} sequences or heads"
    return _unable(query) or _unknown_gradient(options)


def _unable(query: Tensor) -> str | None:
    """Return why Triton can't run on this tensor's device, or None."""
    if triton.knobs.runtime.interpret:
        return "Triton's interpreter can't multiply bf16" if query.dtype == torch.bfloat16 else None
    if not query.is_cuda:
        return f"tensors are on {query.device}"
    if torch.version.hip is not None:
        return "its tiles are made for NVIDIA GPUs"
    if torch.cuda.get_device_capability(query.device) < _OLDEST:
        return f"the GPU's compute capability is below {_OLDEST[0]}.{_OLDEST[1]}"
    return None


def _unknown_gradient(options: Options) -> str | None:
    if torch.is_grad_enabled():
        for name in ("slopes", "gamma"):
            tensor = getattr(options, name)
            if tensor is not None and tensor.requires_grad:
                return f"the Triton kernels have no gradient of {name}"
    return None


def attention(
    query: Tensor, key: Tensor, value: Tensor, options: Options, *, lse: bool
) -> tuple[Tensor, Tensor | None]:
    """See `attention` and `attention_with_lse` of the package. The output lies as (B, S, H, V)."""
    sinks = options.sinks
    given = (query, key, value) if sinks is None else (query, key, value, sinks)
    with launching.on_device_of(query):
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
            output, sums = _Attention.apply(query, key, value, sinks, options)  # type: ignore[no-untyped-call]
        else:
            output, sums = _forward(_readable(query, key, value), options)
    return output, sums if lse else None


def _readable(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(launching.readable(tensor) for tensor in tensors)


def _forward(tensors: tuple[Tensor, ...], options: Options) -> tuple[Tensor, Tensor]:
    query, key, value = tensors
    if kernel_decode.fits(query, options):
        return kernel_decode.decode(query, key, value, options)
    return kernel.forward(query, key, value, options)


class _Attention(torch.autograd.Function):
    """Both outputs are differentiable: a log-sum-exp's gradient only moves each row's delta."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor]:
        tensors = _readable(query, key, value)
        output, lse = _forward(tensors, options)
        ctx.options = replace(options, ranges=None, slopes=None, sinks=None, gamma=None)
        ctx.save_for_backward(*tensors, output, lse, sinks, options.ranges, options.slopes, options.gamma)
        ctx.set_materialize_grads(False)
        return output, lse

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse, sinks, ranges, slopes, gamma = ctx.saved_tensors
        d_output, d_lse = gradients
        options = replace(ctx.options, ranges=ranges, slopes=slopes, gamma=gamma)
        with launching.on_device_of(query):
            if d_output is None:
                d_output = torch.zeros_like(output)
            d_query, d_key, d_value, delta = kernel_backward.backward(
                (query, key, value), (output, lse), (d_output, d_lse), options
            )
        d_sinks = None if sinks is None else _sinks_gradient(sinks, lse, delta)
        return d_query, d_key, d_value, d_sinks, None


def _sinks_gradient(sinks_H: Tensor, lse_BHS: Tensor, delta_BHS: Tensor) -> Tensor:
    """Return the gradient of sinks: a sink mixes in no value, so that of its weight is 0 - delta."""
    weight_BHS = torch.exp(sinks_H.float()[:, None] - lse_BHS)
    seen_BHS = torch.where(lse_BHS == -torch.inf, 0.0, weight_BHS)
    return -(seen_BHS * delta_BHS).sum((0, 2)).to(sinks_H.dtype)
