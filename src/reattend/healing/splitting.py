"""Tensors that are split over processes (DTensor), or the same in each: between them and whole ones."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_split(module: nn.Module) -> bool:
    """Whether a module's weights are split over the processes."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, sharing its memory."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU, gathered where it is split; all processes must call it."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.cpu()


def spread(place: Tensor, value: Tensor | None) -> None:
    """Fill `place` in every process with the main one's `value`, or with the part of it that the process holds."""
    full = torch.empty(place.shape, dtype=place.dtype) if value is None else value
    if dist.is_initialized() and dist.get_world_size() > 1:
        # AdamW's counts of steps stay on the CPU, where some backends can't send from.
        full = full.to(torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu")
        dist.broadcast(full, 0)
    local(place).copy_(split_like(full, place))


def split_like(value: Tensor, place: Tensor) -> Tensor:
    """Return the rows of `value`, the same in every process, that go with this process's part of `place`."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    value = value.to(place.device)
    if not isinstance(place, DTensor):
        return value
    return distribute_tensor(value, place.device_mesh, place.placements, src_data_rank=None).to_local()
