"""The safetensors header, read strictly and written deterministically.

A file is: 8 bytes little-endian header length, the header (JSON), the data. The reader takes nothing on
trust: a header that lies is refused with the file and tensor named, before any data is touched.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from reattend.errors import Refusal

MAX_HEADER_BYTES = 100_000_000  # the limit that the safetensors library itself sets

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6,
    "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's name, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The size in bytes as stored."""
        return self.numel * BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: `start` is its offset in bytes from the beginning of `file`."""

    spec: TensorSpec
    file: str
    start: int


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header: tensors in the order of their data, the metadata, and the header's sha256."""

    tensors: tuple[StoredTensor, ...]
    metadata: dict[str, str]
    digest: str


def read_header(read: Callable[[int, int], bytes], size: int, file: str) -> Header:
    """Read the header of `file` (`size` bytes long); `read(start, length)` returns bytes.

    Raises `Refusal` that names the file, and the tensor where there is one.
    """
    if size < 8:
        raise Refusal(f"{file}: {size} bytes are too few for a safetensors file (truncated?)")
    length = int.from_bytes(read(0, 8), "little")
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise Refusal(f"{file}: header length {length} does not fit a file of {size} bytes")
    text = read(8, length)
    if len(text) != length:
        raise Refusal(f"{file}: ends inside its header")
    entries = _decode(text, file)
    metadata = _metadata(entries.pop("__metadata__", {}), file)
    spans = sorted(_span(name, entry, file) for name, entry in entries.items())
    _check_contiguous(spans, size - 8 - length, file)
    stored = (StoredTensor(spec, file, 8 + length + start) for start, _, _, spec in spans)
    return Header(tuple(stored), metadata, hashlib.sha256(text).hexdigest())


def _decode(text: bytes, file: str) -> dict[str, Any]:
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_finite)
    except RecursionError as error:
        raise Refusal(f"{file}: header is nested too deeply") from error
    except ValueError as error:  # covers UnicodeDecodeError and JSONDecodeError
        raise Refusal(f"{file}: header is not valid JSON ({error})") from error
    if not isinstance(entries, dict):
        raise Refusal(f"{file}: header is not a JSON object")
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} appears twice")
    return entries


def _finite(constant: str) -> float:
    raise ValueError(f"{constant} is not a JSON number")


def _metadata(value: Any, file: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise Refusal(f"{file}: __metadata__ is not a map of strings")
    return value


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(map(_natural, value))


def _span(name: str, entry: Any, file: str) -> tuple[int, int, str, TensorSpec]:
    where = f"{file}: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise Refusal(f"{where}: entry must hold exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise Refusal(f"{where}: unknown dtype {dtype!r}")
    if not _naturals(shape):
        raise Refusal(f"{where}: shape {shape!r} is not a list of sizes")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise Refusal(f"{where}: data_offsets {offsets!r} are not a begin and an end")
    spec = TensorSpec(name, dtype, tuple(shape))
    if spec.numel * BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise Refusal(f"{where}: {dtype} {shape} does not fill {offsets[1] - offsets[0]} bytes")
    return offsets[0], offsets[1], name, spec


def _check_contiguous(spans: list[tuple[int, int, str, TensorSpec]], room: int, file: str) -> None:
    position = 0
    for begin, end, name, _ in spans:
        if begin != position:
            kind = "overlaps its neighbour" if begin < position else "leaves a hole before it"
            raise Refusal(f"{file}: tensor {name!r} {kind} (at {begin}, expected {position})")
        position = end
    if position != room:
        kind = "truncated" if position > room else "too long"
        raise Refusal(f"{file}: {kind}: tensors end at {position}, the data at {room}")


def render_header(specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """Return the header bytes (length prefix included) and each tensor's offset in the file.

    Tensors are laid out by falling element size, so that every one is aligned for zero-copy readers.
    """
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for spec in sorted(specs, key=lambda spec: (-BITS[spec.dtype], spec.name)):
        span = [position, position + spec.nbytes]
        entries[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": span}
        position += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    starts = {n: base + e["data_offsets"][0] for n, e in entries.items() if n != "__metadata__"}
    return len(text).to_bytes(8, "little") + text, starts
