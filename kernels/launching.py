"""Where Triton kernels are launched."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make a tensor's GPU the current one meanwhile: Triton launches there, which need not be where the tensors are.

    With tensors on a CPU (Triton's interpreter) nothing changes.
    """
    return torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call, no-any-return]
