"""Output that appears whole or not at all.

Everything is written to a hidden folder beside the output; its journal names the groups whose bytes have
reached the disk; the last act is one rename. A killed run leaves only that folder, for `--resume`.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reattend.checkpoint.header import TensorSpec, render_header
from reattend.checkpoint.index import SINGLE
from reattend.errors import Refusal

_SYNC_BYTES = 256 << 20  # how much work a power cut may cost
_JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class Layout:
    """Where each output tensor goes: shard file -> header bytes, tensor -> (shard, offset)."""

    headers: dict[str, bytes]
    places: dict[str, tuple[str, int]]
    nbytes: int

    def index(self) -> bytes | None:
        """Return the index file's bytes, or nothing for a single shard."""
        if len(self.headers) == 1:
            return None
        weight_map = {name: shard for name, (shard, _) in sorted(self.places.items())}
        content = {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map}
        return (json.dumps(content, indent=2) + "\n").encode()


def lay_out(specs: Iterable[TensorSpec], metadata: Mapping[str, str], max_bytes: int) -> Layout:
    """Pack tensors in the given order into shards of at most `max_bytes` (one tensor at least)."""
    shards: list[list[TensorSpec]] = [[]]
    filled = total = 0
    for spec in specs:
        if shards[-1] and filled + spec.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.nbytes
        total += spec.nbytes
    headers: dict[str, bytes] = {}
    places: dict[str, tuple[str, int]] = {}
    for number, members in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        headers[file], starts = render_header(members, metadata)
        places |= {name: (file, start) for name, start in starts.items()}
    return Layout(headers, places, total)


class Staging:
    """The hidden folder, its lock and its journal. Use as a context manager."""

    def __init__(self, out: Path, key: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        self.out = out
        self.folder = out.parent / f".{out.name}.partial"
        self.work = self.folder / "work"  # what a run needs on its way, gone from the output
        self._key = dict(key)
        self._resume = resume
        self._overwrite = overwrite
        self.done: set[int] = set()
        self._shards: dict[str, int] = {}
        self._pending: list[int] = []
        self._unsynced = 0

    def __enter__(self) -> "Staging":
        if self.out.exists() and not self._overwrite and not _empty(self.out):
            raise Refusal(f"{self.out}: exists; pass --overwrite to replace it")
        if self.folder.exists() and not self._resume:
            if not self._overwrite:
                raise Refusal(f"{self.out}: an interrupted run is there; pass --resume or --overwrite")
            shutil.rmtree(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Refusal(f"{self.out.parent}: cannot be written to ({error.strerror})") from error
        self._journal = (self.folder / _JOURNAL).open("a+b")
        self._lock()
        self._recall()
        return self

    def _lock(self) -> None:
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._journal.close()
            raise Refusal(f"{self.out}: another run is writing it") from error

    def _recall(self) -> None:
        """Read the journal up to its last whole line; a torn line was never promised."""
        self._journal.seek(0)
        whole = self._journal.read().rpartition(b"\n")[0]
        lines = whole.split(b"\n") if whole else []
        self._journal.truncate(len(whole) + 1 if whole else 0)
        if lines and json.loads(lines[0]) != self._key:
            self._journal.close()
            raise Refusal(f"{self.out}: the interrupted run had another recipe, source or version; use --overwrite")
        if not lines:
            self._note(self._key)
        self.done = {group for line in lines[1:] for group in json.loads(line)}

    def _note(self, value: Any) -> None:
        self._journal.write(json.dumps(value).encode() + b"\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def open_shards(self, layout: Layout) -> None:
        """Open every shard at its full size, header written."""
        for file, header in layout.headers.items():
            shard = os.open(self.folder / file, os.O_RDWR | os.O_CREAT, 0o644)
            _write_all(shard, memoryview(header), 0)
            self._shards[file] = shard

    def write(self, file: str, data: memoryview, offset: int) -> None:
        """Write bytes of a tensor."""
        _write_all(self._shards[file], data, offset)
        self._unsynced += len(data)

    def finish_group(self, group: int) -> None:
        """Count a group as written; the journal learns of it once its bytes are on the disk."""
        self._pending.append(group)
        if self._unsynced >= _SYNC_BYTES:
            self.sync()

    def sync(self) -> None:
        """Bring the pending groups to the disk, then note them."""
        for shard in self._shards.values():
            os.fdatasync(shard)
        if self._pending:
            self._note(self._pending)
        self._pending, self._unsynced = [], 0

    def add_file(self, file: str, data: bytes) -> None:
        """Write a whole small file."""
        path = self.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())

    def copy_file(self, source: Path, file: str) -> None:
        """Copy a sidecar byte for byte."""
        path = self.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)

    def commit(self) -> None:
        """Make the output appear, in place of an older one when overwriting."""
        self.sync()
        old = self.out.parent / f".{self.out.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self.work, ignore_errors=True)
        (self.folder / _JOURNAL).unlink()
        if self.out.exists():
            self.out.rename(old)
        self.folder.rename(self.out)
        _sync_folder(self.out.parent)
        shutil.rmtree(old, ignore_errors=True)

    def discard(self) -> None:
        """Remove everything that this run wrote."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __exit__(self, *_: object) -> None:
        for shard in self._shards.values():
            os.close(shard)
        self._journal.close()


def _empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
