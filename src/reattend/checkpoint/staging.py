"""Output that appears whole or not at all.

Everything is written to a folder inside a hidden folder beside the output; a journal names the groups whose
bytes have reached the disk; the last act is one rename. A killed run leaves only the hidden folder, for
`--resume`; what it had finished is never done again.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reattend.checkpoint.files import CALL_BYTES
from reattend.checkpoint.header import TensorSpec, render_header
from reattend.checkpoint.index import SINGLE
from reattend.errors import Refusal

_SYNC_BYTES = 256 << 20  # how much work a power cut may cost
JOURNAL = "journal.jsonl"
_REPLACED = "replaced"


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
    """The hidden folder `.OUT.partial`: the journal, which is also the lock; `out`, which becomes OUT; `work`.

    Use as a context manager. The journal's last word is `finished`: after it only renames are left.
    """

    def __init__(self, out: Path, key: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        self.out = out
        self.folder = out.parent / f".{out.name}.partial"
        self.files = self.folder / "out"
        self.work = self.folder / "work"  # what a run needs on its way
        self._key = dict(key)
        self._resume = resume
        self._overwrite = overwrite
        self._fresh = True
        self.finished = False  # an interrupted run had written everything: `commit` is all that is left
        self.done: set[int] = set()
        self._shards: dict[str, int] = {}
        self._pending: list[int] = []
        self._unsynced = 0
        self._syncer = ThreadPoolExecutor(1)  # work goes on while the disk is written to
        self._syncing: Future[None] | None = None

    def __enter__(self) -> "Staging":
        try:
            self._open()
        except OSError as error:
            raise Refusal(f"{self.out}: cannot be written to ({error.strerror})") from error
        return self

    def _open(self) -> None:
        present = self.folder.exists() or self.folder.is_symlink()
        if present:
            self._check_ours()
        elif self.out.exists() and not self._overwrite and not _empty(self.out):
            raise Refusal(f"{self.out}: exists; pass --overwrite to replace it")
        self.folder.mkdir(exist_ok=True)
        self._journal = (self.folder / JOURNAL).open("a+b")
        try:
            self._lock()
            self._take_over(present)
        except BaseException:
            self._journal.close()
            raise

    def _check_ours(self) -> None:
        real = self.folder.is_dir() and not self.folder.is_symlink()
        if not real or not (self.folder / JOURNAL).is_file():
            raise Refusal(f"{self.folder}: is not ours; move it away")

    def _lock(self) -> None:
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.fstat(self._journal.fileno()).st_ino == (self.folder / JOURNAL).stat().st_ino
        except (BlockingIOError, FileNotFoundError):
            mine = False  # held by a run, or gone with a run that has just finished
        if not mine:
            raise Refusal(f"{self.out}: another run is writing it")

    def _take_over(self, present: bool) -> None:
        """Go on with what an interrupted run left, or clear it away."""
        lines = self._recall() if present and self._resume else []
        if present and not self._resume and not self._overwrite:
            raise Refusal(f"{self.out}: an interrupted run is there; pass --resume or --overwrite")
        if lines and lines[0] != self._key:
            other = "recipe, source, text, device or version"
            raise Refusal(f"{self.out}: the interrupted run had another {other}; use --overwrite")
        self._fresh = not lines
        if not lines:
            self._journal.truncate(0)
            self._clear()
            self._note(self._key)
        self.finished = "finished" in lines
        if not self.finished and self.out.exists() and not self._overwrite and not _empty(self.out):
            raise Refusal(f"{self.out}: exists; pass --overwrite to replace it")
        self.done = {group for line in lines[1:] if isinstance(line, list) for group in line}
        for folder in () if self.finished else (self.files, self.work):
            folder.mkdir(exist_ok=True)

    def _recall(self) -> list[Any]:
        """Read the journal up to its last whole line; a torn line was never promised."""
        self._journal.seek(0)
        whole = self._journal.read().rpartition(b"\n")[0]
        self._journal.truncate(len(whole) + 1 if whole else 0)
        try:
            lines = [json.loads(line) for line in whole.split(b"\n")] if whole else []
        except (ValueError, RecursionError) as error:
            raise Refusal(f"{self.folder / JOURNAL}: is damaged; use --overwrite") from error
        if not all(line == "finished" or _group_numbers(line) for line in lines[1:]):
            raise Refusal(f"{self.folder / JOURNAL}: is damaged; use --overwrite")
        return lines

    def _clear(self) -> None:
        for folder in (self.files, self.work, self.folder / _REPLACED):
            shutil.rmtree(folder, ignore_errors=True)

    def _note(self, value: Any) -> None:
        self._journal.write(json.dumps(value).encode() + b"\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    @property
    def resumed(self) -> bool:
        """Whether it goes on with what an interrupted run left."""
        return not self._fresh

    @property
    def holds_work(self) -> bool:
        """Whether there is something in it that a resumed run would not have to do again."""
        wait([self._syncing] if self._syncing else [])
        return not self._fresh or bool(self.done) or any(file.is_file() for file in self.work.rglob("*"))

    def open_shards(self, layout: Layout, ends: Mapping[int, Mapping[str, int]]) -> None:
        """Open every shard, header written. `ends` says how far each group reaches into each shard.

        Raises `Refusal` where a shard lacks what the journal says is on the disk.
        """
        for group in self.done:
            for file, end in ends.get(group, {"no such group": 0}).items():
                path = self.files / file
                if not path.is_file() or path.stat().st_size < end:
                    raise Refusal(f"{self.folder}: lacks what its journal says was written; use --overwrite")
        for file, header in layout.headers.items():
            shard = os.open(self.files / file, os.O_RDWR | os.O_CREAT, 0o644)
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
            self._start_sync()

    def sync(self) -> None:
        """Bring the pending groups to the disk, then note them."""
        self._start_sync()
        self._await_sync()

    def _start_sync(self) -> None:
        self._await_sync()  # one at a time: what waits for the disk stays bounded
        pending, self._pending, self._unsynced = self._pending, [], 0
        self._syncing = self._syncer.submit(self._bring_to_disk, pending)

    def _await_sync(self) -> None:
        syncing, self._syncing = self._syncing, None
        if syncing is not None:
            syncing.result()

    def _bring_to_disk(self, groups: list[int]) -> None:
        for shard in self._shards.values():
            os.fdatasync(shard)
        if groups:
            self._note(groups)
        self.done.update(groups)

    def add_file(self, file: str, data: bytes) -> None:
        """Write a whole small file of the output."""
        path = self.files / file
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)

    def copy_file(self, source: Path, file: str) -> None:
        """Copy a sidecar byte for byte."""
        path = self.files / file
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)
        _sync_path(path)

    def commit(self) -> None:
        """Make the output appear, in place of an older one when overwriting."""
        if not self.finished:
            self.sync()
            _sync_path(self.files)
            self._note("finished")
        if not any((folder / "config.json").is_file() for folder in (self.files, self.out)):
            raise Refusal(f"{self.folder}: lacks what its journal says was written; use --overwrite")
        if self.files.exists():  # else a run was killed between the last rename and the clearing
            if self.out.exists():
                self.out.rename(self.folder / _REPLACED)
            self.files.rename(self.out)
            _sync_path(self.out.parent)
        self.discard()

    def discard(self) -> None:
        """Remove the folder, the journal last: until then the folder is known as ours."""
        self._syncer.shutdown()
        self._clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __exit__(self, *_: object) -> None:
        self._syncer.shutdown()
        for shard in self._shards.values():
            os.close(shard)
        self._journal.close()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears whole, and on the disk, or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(path)


def _group_numbers(line: Any) -> bool:
    return isinstance(line, list) and all(type(number) is int and number >= 0 for number in line)


def _empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data[:CALL_BYTES], offset)
        data, offset = data[written:], offset + written


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
