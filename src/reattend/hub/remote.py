"""A model repository on the Hub, through huggingface_hub, with errors that say what to do."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reattend.errors import Failure, ReattendError, Refusal, first_line

_SMALL = 1 << 26  # bytes up to which git's own name of a file is looked at: the Hub stores larger ones as LFS


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub lists it: its size, git's name for it, and of a file in LFS its sha256."""

    size: int
    blob_id: str
    sha256: str | None

    def is_same(self, path: Path, sha256: str) -> bool:
        """Whether it holds the bytes of a local file of that hash."""
        if self.size != path.stat().st_size:
            return False
        if self.sha256 is not None:
            return self.sha256 == sha256
        return self.size <= _SMALL and self.blob_id == _blob_id(path)


def _blob_id(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Remote:
    """One repository. Every method raises `Refusal` or `Failure` in one line, without the token."""

    def __init__(self, name: str) -> None:
        from huggingface_hub import HfApi, constants, get_token
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise Refusal(f"{name}: can't be a repository's name; expected org/name or name") from error
        if name.count("/") != 1:
            raise Refusal(f"{name}: names no owner; expected org/name")
        if constants.HF_HUB_OFFLINE:
            raise Refusal(f"{name}: HF_HUB_OFFLINE is set, and pushing needs the Hub")
        if get_token() is None:
            raise Refusal(f"{name}: no token to push with: run hf auth login, or set HF_TOKEN")
        self.name, self.api = name, HfApi()

    def head(self, revision: str) -> str | None:
        """Return the commit of a branch, None where there is no such repository or branch."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        with self._asking("can't be looked at"):
            try:
                return str(self.api.model_info(self.name, revision=revision).sha)
            except (RepositoryNotFoundError, RevisionNotFoundError) as error:
                if _status(error) == 401:  # the Hub's answer to a bad token, for a repository that may well exist
                    raise
                return None

    def files(self, revision: str) -> dict[str, RemoteFile]:
        """Return path -> file of a branch or commit."""
        with self._asking("its files can't be listed"):
            entries = self.api.list_repo_tree(self.name, revision=revision, recursive=True)
            return {e.path: _file(e) for e in entries if hasattr(e, "size")}

    def create(self, *, private: bool) -> None:
        """Create the repository; one that is there stays as it is."""
        with self._asking("can't be created"):
            self.api.create_repo(self.name, private=private or None, exist_ok=True)

    def create_branch(self, branch: str) -> None:
        """Create a branch off main; one that is there stays as it is."""
        with self._asking(f"its branch {branch} can't be created"):
            self.api.create_branch(self.name, branch=branch, exist_ok=True)

    def upload(self, operation: Any, revision: str, *, create_pr: bool) -> None:
        """Send a file's content, if the Hub has not got it; nothing of it is seen before the commit."""
        with self._asking(f"{operation.path_in_repo} can't be sent"):
            self.api.preupload_lfs_files(self.name, [operation], revision=revision, create_pr=create_pr)

    def commit(self, operations: Iterable[Any], message: str, revision: str, **options: Any) -> Any:
        """Commit; see `HfApi.create_commit`."""
        with self._asking("the commit failed"):
            return self.api.create_commit(self.name, operations, commit_message=message, revision=revision, **options)

    def open_pull_request(self, title: str) -> str | None:
        """Return the revision of an open pull request of that title."""
        with self._asking("its pull requests can't be listed"):
            found = self.api.get_repo_discussions(self.name, discussion_type="pull_request", discussion_status="open")
            return next((f"refs/pr/{each.num}" for each in found if each.title == title), None)

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        try:
            yield
        except ReattendError:
            raise
        except Exception as error:  # noqa: BLE001 (those of the client's transport have another base in each release)
            raise _told(self.name, what, error) from None  # the cause may quote headers


def _file(entry: Any) -> RemoteFile:
    lfs = entry.lfs
    return RemoteFile(entry.size, entry.blob_id, None if lfs is None else lfs.sha256)


def _told(name: str, what: str, error: Exception) -> ReattendError:
    """Return a client's error as ours."""
    if isinstance(error, ValueError) and "README.md" in str(error):  # what its validator says is on further lines
        return Refusal(f"{name}: {what}: {' '.join(str(error).split())}")
    cause: BaseException | None = error
    status = None
    while cause is not None and status is None:  # the client wraps what went wrong in a thread
        status, innermost = _status(cause), cause
        cause = cause.__cause__
    if status == 401:
        return Refusal(f"{name}: the Hub does not take the token: run hf auth login, or set HF_TOKEN anew")
    if status == 403:
        return Refusal(f"{name}: {what}: the token has no right to write there")
    if status == 404:
        return Refusal(f"{name}: {what}: the Hub has no such repository or revision for this token")
    if status == 409:
        return Refusal(f"{name}: {what}: the name is taken")
    if status is not None:
        return Failure(f"{name}: {what}: the Hub answered {status}; run it again to go on")
    reason = first_line(innermost if isinstance(innermost, Exception) else error)
    return Failure(f"{name}: {what}: {reason}; run it again to go on")


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None
