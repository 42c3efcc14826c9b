"""push(): a verified output to the Hub, resumable, in one commit, and compared there afterwards."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reattend import processes
from reattend.checkpoint.index import INDEX, MANIFEST, WEIGHTS
from reattend.errors import Failure, Refusal
from reattend.hub.remote import Remote, RemoteFile
from reattend.progress import Progress, silent
from reattend.reporting.record import read_report, verified_files

_MAIN = "main"
_PLAIN = (".gitattributes", ".gitignore", "README.md", "LICENSE")  # what a repository without a model may hold
_TRIES = 3  # of a commit whose answer did not come


@dataclass(frozen=True)
class _Push:
    """What is pushed, where, and what is there already."""

    folder: Path
    files: Mapping[str, str]
    revision: str
    head: str | None
    there: Mapping[str, RemoteFile] = field(default_factory=dict)

    @property
    def missing(self) -> list[str]:
        """The files that the Hub has not got, or has with another content."""
        return [name for name in self.files if not self._is_there(name)]

    @property
    def stale(self) -> list[str]:
        """Weights on the Hub that loaders would read beside or in place of these."""
        others = (name for name in self.there if name not in self.files)
        return [name for name in others if name == INDEX or ("/" not in name and name.endswith(WEIGHTS))]

    @property
    def kept(self) -> list[str]:
        """Other files on the Hub, which stay."""
        return [name for name in self.there if name not in self.files and name not in self.stale]

    @property
    def title(self) -> str:
        """The commit's title; it tells these files from any others."""
        content = "\n".join(f"{digest} {name}" for name, digest in sorted(self.files.items()))
        return f"reattend: output {hashlib.sha256(content.encode()).hexdigest()[:12]}"

    def nbytes(self, names: list[str]) -> int:
        """Return the bytes of local files."""
        return sum((self.folder / name).stat().st_size for name in names)

    def _is_there(self, name: str) -> bool:
        return name in self.there and self.there[name].is_same(self.folder / name, self.files[name])


def push(
    out: str | os.PathLike[str],
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Push the verified output `out` to `repository` (org/name), a model repository that is created where it is not.

    The contents of large files go first, one by one, those alone that the Hub has not got; then one commit makes all
    files visible at once, or as a pull request with `create_pr`. An interrupted push is gone on with by running it
    again. Weights of another layout that loaders would read in the place of these are deleted by that commit; other
    files stay. Afterwards the Hub's listing is compared with the hashes here. `revision` is a branch, made where it
    is not. A repository that holds something else than an output of reattend is refused, but with `overwrite` or as a
    pull request. `progress` is told bytes ("pushing"). Returns repository, commit, url, files, bytes, what was sent.
    Raises `Refusal` for an output that is not verified, names and rights; `Failure` for what goes wrong on the way.
    """
    files = verified_files(out)
    remote = Remote(repository)
    if create_pr and revision is not None:
        raise Refusal("--create-pr goes with no --revision: a pull request has a revision of its own")
    if processes.rank():
        return {}
    planned = _look(remote, _Push(Path(out), files, revision or _MAIN, None))
    _check_taken(planned, repository, allowed=overwrite or create_pr)
    if dry_run:
        return _summary(planned, repository) | {"dry_run": True}
    if planned.head is None:
        remote.create(private=private)
        if revision is not None:
            remote.create_branch(revision)
        planned = _look(remote, planned)
    if create_pr:
        return _propose(remote, planned, progress)
    commit, _ = _send(remote, planned, create_pr=False, progress=progress)
    _compare(remote, planned, commit)
    return _summary(planned, repository) | {"commit": commit, "url": _url(remote, f"tree/{commit}")}


def _look(remote: Remote, push: _Push) -> _Push:
    """Return the push with what the Hub holds now."""
    head = remote.head(push.revision)
    there = {} if head is None else remote.files(head)
    return _Push(push.folder, push.files, push.revision, head, there)


def _check_taken(push: _Push, repository: str, *, allowed: bool) -> None:
    """Refuse to put an output over another model, such as its own source."""
    foreign = [name for name in push.there if name not in _PLAIN]
    if foreign and MANIFEST not in push.there and not allowed:
        held = f"holds {foreign[0]} and {len(foreign) - 1} more files" if len(foreign) > 1 else f"holds {foreign[0]}"
        raise Refusal(f"{repository}: {held}, which no reattend wrote: choose another name, or --overwrite")


def _propose(remote: Remote, push: _Push, progress: Progress) -> dict[str, Any]:
    """Open a pull request, or go on with the one that an earlier run opened."""
    opened = remote.open_pull_request(push.title)
    if opened is not None:
        push = _look(remote, _Push(push.folder, push.files, opened, None))
    commit, made = _send(remote, push, create_pr=opened is None, progress=progress)
    _compare(remote, push, commit)
    revision = opened or made
    place = "" if revision is None else f"discussions/{revision.rpartition('/')[2]}"
    return _summary(push, remote.name) | {"commit": commit, "pull_request": revision, "url": _url(remote, place)}


def _send(remote: Remote, push: _Push, *, create_pr: bool, progress: Progress) -> tuple[str, str | None]:
    """Send contents, then commit; return the commit, the one that is there if nothing is missing, and its request."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    missing, done = push.missing, 0
    if not missing and not push.stale and push.head is not None:
        return push.head, None
    total, added = push.nbytes(missing), []
    for name in missing:
        operation = CommitOperationAdd(name, str(push.folder / name))
        remote.upload(operation, push.revision, create_pr=create_pr)
        if operation.upload_info.sha256.hex() != push.files[name]:
            raise Refusal(f"{push.folder / name}: was changed while it was sent; verify the output again")
        added.append(operation)
        done += operation.upload_info.size
        progress("pushing", done, total)
    operations = [*added, *(CommitOperationDelete(name, is_folder=False) for name in push.stale)]
    return _commit(remote, push, operations, create_pr)


def _commit(remote: Remote, push: _Push, operations: list[Any], create_pr: bool) -> tuple[str, str | None]:
    """Commit on top of what was looked at, and on nothing else, so that no one's commit is lost."""
    for attempt in range(1, _TRIES + 1):
        try:
            options = {"parent_commit": push.head, "create_pr": create_pr}
            made = remote.commit(operations, push.title, push.revision, **options)
            return str(made.oid), made.pr_revision
        except Failure:
            if create_pr:
                raise  # it may have been opened: the next run looks
            now = _look(remote, push)
            if not now.missing and not now.stale and now.head is not None:
                return now.head, None  # it was made, and its answer lost
            if now.head != push.head:
                moved = f"someone else committed to {push.revision} meanwhile ({now.head}), and nothing was changed"
                raise Failure(f"{remote.name}: {moved}; run it again to put the output on top") from None
            if attempt == _TRIES:
                raise
    raise AssertionError("the loop returns or raises")


def _compare(remote: Remote, push: _Push, commit: str) -> None:
    """Compare what a commit holds with the files here."""
    after = _Push(push.folder, push.files, push.revision, commit, remote.files(commit))
    if after.missing:
        reason = "differs from the file here" if after.missing[0] in after.there else "is not there"
        more = f" ({len(after.missing)} such files)" if len(after.missing) > 1 else ""
        raise Failure(f"{remote.name}: at commit {commit} {after.missing[0]} {reason}{more}; run it again")


def _summary(push: _Push, repository: str) -> dict[str, Any]:
    missing = push.missing
    remarks = []
    if push.stale:
        remarks.append(f"deleted, as loaders would read them in place of these weights: {', '.join(push.stale)}")
    if push.kept:
        remarks.append(f"left as they are: {', '.join(push.kept)}")
    named = (read_report(push.folder) or {}).get("repository")
    if named != repository:
        name = named or "its folder's name"
        remarks.append(
            f"README.md loads the model by {name}: reattend report {push.folder} --repository {repository} names it"
        )
    return {  # what is sent: what the Hub had not got when it was looked at
        "repository": repository,
        "revision": push.revision,
        "exists": push.head is not None,
        "files": len(push.files),
        "bytes": push.nbytes(list(push.files)),
        "files_sent": len(missing),
        "bytes_sent": push.nbytes(missing),
        "remarks": remarks,
    }


def _url(remote: Remote, place: str) -> str:
    return f"{remote.api.endpoint}/{remote.name}/{place}"
