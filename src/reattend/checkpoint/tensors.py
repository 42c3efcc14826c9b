"""Between bytes and torch: read a stored tensor, view a tensor's bytes, check that numbers are finite."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from reattend.checkpoint.files import CALL_BYTES
from reattend.checkpoint.header import StoredTensor
from reattend.errors import Failure

BLOCK_BYTES = 8 << 20
_ALIGNMENT = 64  # of a tensor in memory, as allocators give it
TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class ShardReader:
    """Reads tensors of a local checkpoint with plain reads: mapped pages would count as our memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, int] = {}
        self._memory = torch.empty(0, dtype=torch.uint8)

    def read_group(self, group: Sequence[StoredTensor]) -> dict[str, Tensor]:
        """Return tensors by name, in memory that the next call uses again: fresh pages cost as much as the copy."""
        needed = sum(_aligned(stored.spec.nbytes) for stored in group)
        if needed > len(self._memory):
            del self._memory  # first, or both would count
            self._memory = torch.empty(needed, dtype=torch.uint8)
        tensors, start = {}, 0
        for stored in group:
            data = self._memory[start : start + stored.spec.nbytes]
            tensors[stored.spec.name] = self._read_into(stored, data)
            start += _aligned(stored.spec.nbytes)
        return tensors

    def read(self, stored: StoredTensor) -> Tensor:
        """Return the whole tensor in its stored dtype and shape."""
        return self._read_into(stored, torch.empty(stored.spec.nbytes, dtype=torch.uint8))

    def expect(self, group: Sequence[StoredTensor]) -> None:
        """Tell the system that `group` is read next, so that the disk works while we compute."""
        if hasattr(os, "posix_fadvise"):  # not on macOS
            for stored in group:
                for offset in range(0, stored.spec.nbytes, CALL_BYTES):  # Linux heeds only the start of a long range
                    length = min(CALL_BYTES, stored.spec.nbytes - offset)
                    os.posix_fadvise(self._file(stored), stored.start + offset, length, os.POSIX_FADV_WILLNEED)

    def _read_into(self, stored: StoredTensor, data: Tensor) -> Tensor:
        self._fill(stored, data, 0)
        return data.view(TORCH_DTYPES[stored.spec.dtype]).reshape(stored.spec.shape)

    def blocks(self, stored: StoredTensor) -> Iterator[tuple[int, Tensor]]:
        """Yield (offset, uint8 block) over the tensor's bytes; the block is reused."""
        buffer = torch.empty(min(BLOCK_BYTES, stored.spec.nbytes), dtype=torch.uint8)
        for offset in range(0, stored.spec.nbytes, BLOCK_BYTES):
            block = buffer[: min(BLOCK_BYTES, stored.spec.nbytes - offset)]
            self._fill(stored, block, offset)
            yield offset, block

    def _file(self, stored: StoredTensor) -> int:
        if stored.file not in self._open:
            self._open[stored.file] = os.open(self._folder / stored.file, os.O_RDONLY)
        return self._open[stored.file]

    def _fill(self, stored: StoredTensor, data: Tensor, offset: int) -> None:
        view = bytes_view(data)
        file, position = self._file(stored), stored.start + offset
        while view:
            count = os.preadv(file, [view[:CALL_BYTES]], position)
            if not count:
                raise Failure(f"{stored.file}: ended inside tensor {stored.spec.name!r} (changed meanwhile?)")
            view, position = view[count:], position + count

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def bytes_view(data: Tensor) -> memoryview:
    """View a uint8 1-D tensor as bytes, writable, without copying."""
    return data.numpy().data  # the buffer that numpy itself exports


def tensor_bytes(tensor: Tensor) -> memoryview:
    """View a tensor's bytes without copying (contiguous tensors)."""
    return bytes_view(tensor.contiguous().reshape(-1).view(torch.uint8))


def all_finite(data: Tensor, dtype: str) -> bool:
    """Whether bytes `data` (uint8, 1-D) of safetensors dtype `dtype` hold no NaN and no infinity."""
    torch_dtype = TORCH_DTYPES.get(dtype)
    if torch_dtype is None or not torch_dtype.is_floating_point or not data.numel():
        return True
    values = data.view(torch_dtype)
    if dtype.startswith("F8"):
        values = values.to(torch.float16)
    # Extremes carry NaN and inf along, and cost one pass where isfinite costs three.
    chunks = torch.split(values, 1 << 18)
    return all(bool(torch.isfinite(torch.stack((c.amax(), c.amin()))).all()) for c in chunks)
