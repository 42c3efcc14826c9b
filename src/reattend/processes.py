"""Several processes under torchrun: which one this is, and what all of them must know."""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

from reattend.errors import Failure, Refusal

_Value = TypeVar("_Value")
# How long one waits for another: a large model may be written meanwhile.
_PATIENCE = timedelta(days=7)


def count() -> int:
    """Return how many processes run together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this one; the first, 0, writes and tells."""
    return int(os.environ.get("RANK", "0"))


def own_device(device: str) -> str:
    """Return the device of this process: of several ones, each has the GPU of its number on its machine."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if count() > 1 and device == "cuda" else device


def check_device(device: str) -> None:
    """Raise `Refusal` for a device that several processes would share."""
    if count() > 1 and device not in ("cpu", "cuda"):
        raise Refusal(f"device {device!r}: several processes take cpu, or cuda and then each its own")


def join(device: str) -> None:
    """Meet the other processes; blocks until all are there."""
    if count() > 1:
        from accelerate import PartialState

        PartialState(cpu=device == "cpu", timeout=_PATIENCE)


def agree(value: _Value) -> _Value:
    """Return the first process's `value` in every process; all of them must call it, after `join`."""
    if count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    holder = [value]
    _together(lambda: broadcast_object_list(holder, from_process=0))
    return holder[0]


def gather(values: Sequence[_Value]) -> list[list[_Value]]:
    """Return every process's `values`, in the order of the processes; all of them must call it, after `join`."""
    if count() == 1:
        return [list(values)]
    from accelerate.utils import gather_object

    found: list[list[_Value]] = _together(lambda: gather_object([list(values)]))
    return found


def meet() -> None:
    """Wait until every process is here."""
    gather([0])


def _together(call: Callable[[], _Value]) -> _Value:
    try:
        return call()
    except RuntimeError as error:  # what torch.distributed raises when a process is gone
        raise Failure("another process stopped; see what it says") from error
