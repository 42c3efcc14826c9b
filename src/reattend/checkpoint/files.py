"""Where a checkpoint's files are read from: a local folder, or a Hub repository by ranges."""

import os
from pathlib import Path
from typing import Protocol

from reattend.errors import Failure, Refusal, first_line

_PRIVATE = {".git", ".cache"}  # version control and download bookkeeping, not part of a checkpoint


class Files(Protocol):
    """A set of files under one name."""

    name: str

    def sizes(self) -> dict[str, int]:
        """Return every file's size in bytes, keyed by its relative POSIX path."""

    def read(self, file: str, start: int, length: int) -> bytes:
        """Return up to `length` bytes of `file` from offset `start`."""


class LocalFolder:
    """Files of a folder on this machine."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.path = path

    def sizes(self) -> dict[str, int]:
        """See `Files.sizes`; links are followed, as the Hub's cache is made of them."""
        found = {}
        for path in sorted(self.path.rglob("*")):
            relative = path.relative_to(self.path)
            if path.is_file() and relative.parts[0] not in _PRIVATE:
                found[relative.as_posix()] = path.stat().st_size
        return found

    def read(self, file: str, start: int, length: int) -> bytes:
        """See `Files.read`."""
        with (self.path / file).open("rb") as stream:
            stream.seek(start)
            return stream.read(length)


class HubRepository:
    """Files of a Hub repository, read by HTTP ranges: nothing is downloaded whole."""

    def __init__(self, repository: str) -> None:
        from huggingface_hub import HfApi

        self.name = repository
        self._api = HfApi()

    def sizes(self) -> dict[str, int]:
        """See `Files.sizes`."""
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            entries = self._api.list_repo_tree(self.name, recursive=True)
            return {e.path: e.size for e in entries if hasattr(e, "size")}
        except HFValidationError as error:
            raise Refusal(f"{self.name}: neither a folder here nor a Hub id") from error
        except (HfHubHTTPError, OSError) as error:
            raise Failure(f"{self.name}: no such folder here, and the Hub answers: {first_line(error)}") from error

    def read(self, file: str, start: int, length: int) -> bytes:
        """See `Files.read`."""
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        if not length:
            return b""
        headers = build_hf_headers() | {"Range": f"bytes={start}-{start + length - 1}"}
        answer = get_session().get(hf_hub_url(self.name, file), headers=headers, follow_redirects=True, timeout=30)
        if answer.status_code != 206 and not (answer.status_code == 200 and start == 0):
            raise Failure(f"{self.name}/{file}: the Hub answered {answer.status_code} to a range")
        return bytes(answer.content[:length])

    def download(self) -> Path:
        """Download the repository into the Hub's cache; return its folder there."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(self.name, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf"]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise Failure(f"{self.name}: cannot be downloaded: {first_line(error)}") from error


def open_files(model: str | os.PathLike[str]) -> LocalFolder | HubRepository:
    """Return the files of a local folder, or of a Hub repository when no such folder exists."""
    path = Path(model)
    if path.is_dir():
        return LocalFolder(path)
    text = str(model)
    if path.exists() or text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise Refusal(f"{text}: not a folder")
    return HubRepository(text)
