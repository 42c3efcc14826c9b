"""Where a checkpoint's files are read from: a local folder, or a Hub repository by ranges."""

import glob
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Protocol

from reattend.errors import Failure, ReattendError, Refusal, first_line

# Of one read or write: calls with tens of megabytes ran at a fifth of the rate of such ones (ext4, 24 MiB each).
CALL_BYTES = 1 << 20
_PRIVATE = {".git", ".cache"}  # version control and download bookkeeping, not part of a checkpoint


class Files(Protocol):
    """A set of files under one name."""

    name: str

    def sizes(self) -> dict[str, int]:
        """Return every file's size in bytes, keyed by its relative POSIX path."""

    def skipped(self) -> dict[str, str]:
        """Return what is no file and holds none that `sizes` could list: its path, and what it is."""

    def read(self, file: str, start: int, length: int) -> bytes:
        """Return up to `length` bytes of `file` from offset `start`."""


class LocalFolder:
    """Files of a folder on this machine."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.path = path

    def sizes(self) -> dict[str, int]:
        """See `Files.sizes`; links are followed, as the Hub's cache is made of them."""
        return self._look()[0]

    def skipped(self) -> dict[str, str]:
        """See `Files.skipped`: links to folders are not followed, as they may lead anywhere."""
        return self._look()[1]

    def _look(self) -> tuple[dict[str, int], dict[str, str]]:
        sizes, skipped = {}, {}
        try:
            for path in sorted(self.path.rglob("*")):
                relative = path.relative_to(self.path)
                if relative.parts[0] in _PRIVATE:
                    continue
                if path.is_file():
                    sizes[relative.as_posix()] = path.stat().st_size
                elif kind := _kind(path):
                    skipped[relative.as_posix()] = kind
        except OSError as error:
            raise Refusal(f"{error.filename or self.name}: {error.strerror or error}") from error
        return sizes, skipped

    def read(self, file: str, start: int, length: int) -> bytes:
        """See `Files.read`."""
        try:
            with (self.path / file).open("rb") as stream:
                stream.seek(start)
                return stream.read(length)
        except OSError as error:
            raise Refusal(f"{self.path / file}: {error.strerror or error}") from error

    def download(self) -> Path:
        """Return the folder: nothing is to be fetched."""
        return self.path


class HubRepository:
    """Files of a Hub repository, read by HTTP ranges: nothing is downloaded whole, except by `download`.

    `name` is org/name, or org/name@revision with a branch, tag or commit. All that is read is of one commit.
    """

    def __init__(self, name: str) -> None:
        from huggingface_hub import HfApi

        self.name = name
        self.repository, _, self._revision = name.partition("@")
        self._api = HfApi()

    @cached_property
    def commit(self) -> str:
        """The commit that is read: what the revision was when it was first asked for."""
        with self._asking(f"{self.name}: no such folder here, and the Hub answers"):
            return str(self._api.model_info(self.repository, revision=self._revision or None).sha)

    def sizes(self) -> dict[str, int]:
        """See `Files.sizes`."""
        with self._asking(f"{self.name}: its files can't be listed"):
            entries = self._api.list_repo_tree(self.repository, revision=self.commit, recursive=True)
            return {e.path: e.size for e in entries if hasattr(e, "size")}

    def skipped(self) -> dict[str, str]:
        """See `Files.skipped`: the Hub holds files alone."""
        return {}

    def read(self, file: str, start: int, length: int) -> bytes:
        """See `Files.read`."""
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        if not length:
            return b""
        span = {"Range": f"bytes={start}-{start + length - 1}", "Accept-Encoding": "identity"}
        request = ("GET", hf_hub_url(self.repository, file, revision=self.commit))
        with (
            self._asking(f"{self.name}/{file}: cannot be read"),
            get_session().stream(
                *request, headers=build_hf_headers() | span, follow_redirects=True, timeout=30
            ) as answer,
        ):
            # A server that ignores ranges sends the whole file: good for its head, of which we take what we need.
            if answer.status_code != 206 and not (answer.status_code == 200 and start == 0):
                raise Failure(f"{self.name}/{file}: the Hub answered {answer.status_code} to a range")
            return _take(answer.iter_bytes(), length)

    def download(self) -> Path:
        """Download what belongs to the checkpoint into the Hub's cache; return its folder there.

        Raises `Refusal`, before the weights are fetched, for a repository that is no sound checkpoint.
        """
        from huggingface_hub import snapshot_download

        from reattend.checkpoint.index import open_checkpoint  # late: it imports this module

        pinned = f"{self.repository}@{self.commit}"
        ignored = [glob.escape(file) for file in open_checkpoint(pinned).ignored]
        with self._asking(f"{self.name}: cannot be downloaded"):
            # By the revision's own name, so that the cache knows it offline; by the commit if it moved meanwhile.
            for revision in (self._revision or None, self.commit):
                folder = Path(snapshot_download(self.repository, revision=revision, ignore_patterns=ignored))
                if folder.name == self.commit:
                    break
            return folder

    @contextmanager
    def _asking(self, doing: str) -> Iterator[None]:
        """Turn the client's errors into ours. Those of its transport have another base in each of its releases."""
        from huggingface_hub.errors import HFValidationError

        try:
            yield
        except ReattendError:
            raise
        except HFValidationError as error:
            raise Refusal(f"{self.name}: neither a folder here nor a Hub id") from error
        except Exception as error:
            raise Failure(f"{doing}: {first_line(error)}") from error


def _kind(path: Path) -> str | None:
    """Say what something is that is no file, or nothing of a folder whose files are listed."""
    if not path.exists():
        return "a link to nothing"
    if path.is_dir() and path.is_symlink():
        return "a link to a folder"
    if path.is_dir():
        return None if os.access(path, os.R_OK | os.X_OK) else "a folder that can't be read"
    return "a pipe" if path.is_fifo() else "a socket" if path.is_socket() else "a device"


def _take(blocks: Iterable[bytes], length: int) -> bytes:
    taken = bytearray()
    for block in blocks:
        taken += block
        if len(taken) >= length:
            break
    return bytes(taken[:length])


def open_files(model: str | os.PathLike[str]) -> LocalFolder | HubRepository:
    """Return the files of a local folder, or of a Hub repository when no such folder exists.

    Offline, a repository is what the Hub's cache holds of it.
    """
    text = str(model)
    if not text:
        raise Refusal("the name of a model is empty: expected a folder, or a Hub id")
    path = Path(model)
    try:
        if path.is_dir():
            return LocalFolder(path)
        exists = path.exists()
    except OSError as error:
        raise Refusal(f"{text}: {error.strerror or error}") from error
    if exists or text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise Refusal(f"{text}: not a folder")
    return _cached(text) or HubRepository(text)


def _cached(name: str) -> LocalFolder | None:
    """Return a repository's files in the Hub's cache if we are offline, and they are there."""
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if not constants.HF_HUB_OFFLINE:
        return None
    repository, _, revision = name.partition("@")
    try:
        config = try_to_load_from_cache(repository, "config.json", revision=revision or None)
    except HFValidationError:
        return None  # the repository itself says what is wrong
    return LocalFolder(Path(config).parent) if isinstance(config, str) else None
