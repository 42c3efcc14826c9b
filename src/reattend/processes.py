"""Several processes under torchrun: which one this is, and what all of them must know."""

import os
from typing import TypeVar

_Value = TypeVar("_Value")


def count() -> int:
    """Return how many processes run together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this one; the first, 0, writes and tells."""
    return int(os.environ.get("RANK", "0"))


def own_device(device: str) -> str:
    """Return the device of this process: of several ones, each has the GPU of its number on its machine."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if count() > 1 and device == "cuda" else device


def join(device: str) -> None:
    """Meet the other processes; blocks until all are there."""
    if count() > 1:
        from accelerate import PartialState

        PartialState(cpu=device == "cpu")


def agree(value: _Value) -> _Value:
    """Return the first process's `value` in every process; all of them must call it, after `join`."""
    if count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    holder = [value]
    broadcast_object_list(holder, from_process=0)
    return holder[0]
