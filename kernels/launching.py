"""What Triton kernels need of tensors, and where they are launched."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

MOST_PROGRAMS = 65535  # that CUDA starts along any but the first axis
_FARTHEST = 1 << 23  # numbers between tokens, so that 128 of them are in reach of an int32


def readable(x: Tensor) -> Tensor:
    """Return x (B, H, S, D) as kernels read it: its numbers side by side, a tile's tokens not too far apart."""
    return x if x.stride(3) == 1 and x.stride(2) <= _FARTHEST else x.contiguous()


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make a tensor's GPU the current one meanwhile: Triton launches there, which need not be where the tensors are.

    With tensors on a CPU (Triton's interpreter) nothing changes.
    """
    return torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call, no-any-return]
