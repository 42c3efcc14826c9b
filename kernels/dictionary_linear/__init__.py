"""Linear layers whose weight is a dictionary's: atoms that layers share and low-rank factors of the rest."""

from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from reattend.kernels.dictionary_linear import products

__all__ = ["dictionary_linear"]

Backend = Literal["auto", "triton", "torch"]
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def dictionary_linear(
    x: Tensor, up: Tensor, down: Tensor, atoms: Tensor, coefficients: Tensor, bias: Tensor | None = None, *,
    backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Return x (sum_s c_s D_s + up down)^T + bias in x's dtype (MASA, arXiv 2508.04581, section 3.3).

        x            (..., I)
        up, down     (O, R), (R, I)   factors of what atoms leave
        atoms        (S, O, I)        contiguous
        coefficients (S,)
        bias         (O,)
        returns      (..., O)

    All in one dtype, on one device. `backend`: "torch" (any device and float dtype, differentiable; a weight (O, I)
    is added up for the time of the call), "triton" (CUDA, or its interpreter; fp32, fp16 and bf16; no gradients; no
    weight is stored, and every atom is read) or "auto": triton on CUDA where no gradient is asked for. The triton
    route adds atoms up in fp32 and rounds the sum to x's dtype. Raises `ValueError` for shapes or dtypes that do not
    fit, and `RuntimeError` for a backend that can't run here.
    """
    tensors = [tensor for tensor in (x, up, down, atoms, coefficients, bias) if tensor is not None]
    _check(x, up, down, atoms, coefficients, bias)
    if len({(tensor.dtype, tensor.device) for tensor in tensors}) > 1:
        raise ValueError("dictionary_linear: all tensors must have one dtype and be on one device")
    x_MI = x.reshape(-1, x.shape[-1])
    if _is_triton(backend, x, any(tensor.requires_grad for tensor in tensors) and torch.is_grad_enabled()):
        from reattend.kernels.dictionary_linear import kernel

        x_MI = x_MI if x_MI.stride(1) == 1 else x_MI.contiguous()
        bias = None if bias is None else bias.contiguous()
        parts = up.contiguous(), down, atoms, coefficients.contiguous(), bias
        return kernel.dictionary_linear(x_MI, *parts).reshape(*x.shape[:-1], len(up))
    return products.dictionary_linear(x_MI, up, down, atoms, coefficients, bias).reshape(*x.shape[:-1], len(up))


def _check(
    x: Tensor, up: Tensor, down: Tensor, atoms: Tensor, coefficients: Tensor, bias: Tensor | None
) -> None:  # fmt: skip
    if atoms.dim() != 3 or not atoms.is_contiguous() or not atoms.shape[0] or not atoms.shape[2]:
        raise ValueError(f"dictionary_linear: atoms {tuple(atoms.shape)} are not (S, O, I), contiguous")
    count, outputs, inputs = atoms.shape
    rank = down.shape[0]
    if x.dim() == 0 or x.shape[-1] != inputs:
        raise ValueError(f"dictionary_linear: x {tuple(x.shape)} does not fit atoms {tuple(atoms.shape)}")
    if up.shape != (outputs, rank) or down.shape != (rank, inputs):
        raise ValueError(f"dictionary_linear: factors {tuple(up.shape)} and {tuple(down.shape)} do not fit the atoms")
    if coefficients.shape != (count,) or (bias is not None and bias.shape != (outputs,)):
        raise ValueError("dictionary_linear: expected a coefficient for each atom and a bias for each output")


def _is_triton(backend: str, x: Tensor, gradient: bool) -> bool:
    """Whether Triton runs a call; raises where it was asked for and can't."""
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"dictionary_linear: backend={backend!r}, not 'auto', 'triton' or 'torch'")
    if backend == "torch" or (backend == "auto" and x.device.type != "cuda"):
        return False
    missing = _missing(x, gradient)
    if missing and backend == "triton":
        raise RuntimeError(f"dictionary_linear: backend 'triton' can't run: {missing}")
    return missing is None


def _missing(x: Tensor, gradient: bool) -> str | None:
    """Return why Triton can't run a call, or None."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if x.dtype not in _FLOATS:
        return f"tensors are {x.dtype}"
    if gradient:
        return "gradients are asked for"
    import triton

    return None if x.is_cuda or triton.knobs.runtime.interpret else f"tensors are on {x.device.type}"
