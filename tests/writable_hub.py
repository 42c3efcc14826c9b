"""A Hub on this machine that takes pushes: repositories, LFS in one part or several, commits, pull requests.

What it answers is what huggingface_hub 2.4.0 asks for. Contents lie on the disk, never whole in memory. Faults are
set by the test: see `WritableHub`.
"""

import hashlib
import json
import os
import threading
from base64 import b64decode
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path

from hub_requests import TOKEN, Requests

LFS_FROM = 4096  # bytes from which a file is stored by its sha256
PART = 64 * 1024  # of a multipart upload


@dataclass
class Repository:
    """Commits (each: path -> entry of a listing), branches and pull requests by name, and titles of the latter."""

    private: bool = False
    commits: dict[str, dict[str, dict]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    titles: dict[int, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, dict]) -> str:
        """Add a commit to a branch; return its name."""
        name = hashlib.sha1(json.dumps([len(self.commits), branch]).encode()).hexdigest()
        self.commits[name], self.branches[branch] = files, name
        return name


class WritableHub(ThreadingHTTPServer):
    """Holds `repositories` by name, contents in `store`, and `sent`, the bytes taken by path of the request.

    Faults: `refuse` maps a pattern of "METHOD path" to statuses, one for each of the next requests like it; `drop`
    to how many bytes of a body are read before the connection is cut, again one each; `slow` is a pause, in
    seconds, before each block of a body; `before_commit` is called once before the next commit; `corrupt` makes the
    listing of a path untrue; `card_errors` is what the validator says of cards; `lose_answer` puts a 503 in the place
    of what the next commit is answered. `asked` are all requests.
    """

    def __init__(self, store: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.store = store
        self.repositories: dict[str, Repository] = {}
        self.sent: Counter[str] = Counter()
        self.asked: list[str] = []
        self.refuse: dict[str, list[int]] = {}
        self.drop: dict[str, list[int]] = {}
        self.slow = 0.0
        self.before_commit = None
        self.corrupt: set[str] = set()
        self.card_errors: list[str] = []
        self.lose_answer = False
        self.multipart = False

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, name: str, files: dict[str, bytes]) -> Repository:
        """Make a repository of files by hand."""
        repository = self.repositories.setdefault(name, Repository())
        entries = dict(repository.commits.get(repository.branches.get("main", ""), {}))
        repository.commit("main", entries | {path: self.keep(path, content) for path, content in files.items()})
        return repository

    def keep(self, path: str, content: bytes) -> dict:
        """Store a regular file; return its entry."""
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        (self.store / blob).write_bytes(content)
        return {"type": "file", "path": path, "size": len(content), "oid": blob}

    def contents(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """Return path -> content of a branch."""
        repository = self.repositories[name]
        entries = repository.commits[repository.branches[revision]]
        stored = {path: entry["lfs"]["oid"] if "lfs" in entry else entry["oid"] for path, entry in entries.items()}
        return {path: (self.store / oid).read_bytes() for path, oid in stored.items()}


class _Handler(Requests):
    server: WritableHub

    def repository(self, name, revision="main"):
        """Return a repository and one of its commits, or answer that there is none."""
        found = self.server.repositories.get(name)
        commit = found and (revision if revision in found.commits else found.branches.get(revision))
        if not commit:
            self.answer(404, {}, {"X-Error-Code": "RevisionNotFound" if found else "RepoNotFound"})
        return found, commit

    def create(self):
        asked = json.loads(self.take(None))
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
        if name in self.server.repositories:
            return self.answer(
                409, {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"}
            )
        self.server.repositories[name] = Repository(
            private=asked.get("visibility") == "private" or bool(asked.get("private"))
        )
        self.server.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
        return self.answer(200, {"url": f"{self.server.url}/{name}", "name": name})

    def validate(self):
        self.take(None)
        errors = [{"message": message} for message in self.server.card_errors]
        return self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def info(self, name, revision="main"):
        _, commit = self.repository(name, revision)
        return commit and self.answer(200, {"id": name, "sha": commit, "siblings": []})

    def tree(self, name, revision, folder=None):
        found, commit = self.repository(name, revision)
        if not commit:
            return None
        start = f"{folder}/" if folder else ""
        entries = [dict(entry) for path, entry in found.commits[commit].items() if path.startswith(start)]
        if folder and not entries:
            return self.answer(404, {}, {"X-Error-Code": "EntryNotFound"})
        for entry in entries:
            if entry["path"] in self.server.corrupt:
                entry |= {"oid": "0" * 40} | ({"lfs": entry["lfs"] | {"oid": "0" * 64}} if "lfs" in entry else {})
        return self.answer(200, entries)

    def branch(self, name, branch):
        self.take(None)
        found, commit = self.repository(name)
        if branch in found.branches:
            return self.answer(409, {"error": "Reference already exists"})
        found.branches[branch] = commit
        return self.answer(200, {})

    def preupload(self, name, revision):
        files = json.loads(self.take(None))["files"]
        _, commit = self.repository(name, revision)
        modes = [
            {"path": f["path"], "uploadMode": "lfs" if f["size"] >= LFS_FROM else "regular", "shouldIgnore": False}
            for f in files
        ]
        return commit and self.answer(200, {"files": modes})

    def batch(self, name):
        objects = [self.action(each) for each in json.loads(self.take(None))["objects"]]
        return self.answer(200, {"transfer": "multipart" if self.server.multipart else "basic", "objects": objects})

    def action(self, each):
        oid, size = each["oid"], each["size"]
        if (self.server.store / oid).exists():
            return {"oid": oid, "size": size}
        place = f"{self.server.url}/store/{oid}"
        if not self.server.multipart:
            return {"oid": oid, "size": size, "actions": {"upload": {"href": place}}}
        parts = {str(n + 1): f"{place}.{n + 1}" for n in range(-(-size // PART))}
        header = {"chunk_size": str(PART), **parts}
        return {"oid": oid, "size": size, "actions": {"upload": {"href": f"{place}/complete", "header": header}}}

    def put(self, oid):
        aside = self.server.store / f"{oid}.{threading.get_ident()}.new"
        with aside.open("wb") as stream:
            self.take(stream)
        aside.rename(self.server.store / oid)
        return self.answer(200, {}, {"ETag": f'"{oid}"'})

    def complete(self, oid):
        count = len(json.loads(self.take(None))["parts"])
        with (self.server.store / f"{oid}.new").open("wb") as whole:
            for number in range(1, count + 1):
                part = self.server.store / f"{oid}.{number}"
                whole.write(part.read_bytes())
                part.unlink()
        (self.server.store / f"{oid}.new").rename(self.server.store / oid)
        return self.answer(200, {})

    def commit(self, name, revision):
        lines = [json.loads(line) for line in self.take(None).splitlines()]
        if self.server.before_commit:
            act, self.server.before_commit = self.server.before_commit, None
            act()
        found, head = self.repository(name, revision)
        if not head:
            return None
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, head):
            return self.answer(412, {"error": "A commit has happened since."})
        files = dict(found.commits[head])
        for line in lines[1:]:
            self.change(files, line["key"], line["value"])
        if "create_pr" in self.query:
            number = len(found.titles) + 1
            revision = f"refs/pr/{number}"
            found.titles[number] = header["summary"]
        made = {"commitOid": found.commit(revision, files), "success": True}
        made["commitUrl"] = f"{self.server.url}/{name}/commit/{made['commitOid']}"
        if self.server.lose_answer:
            self.server.lose_answer = False
            return self.answer(503, {})
        if "create_pr" in self.query:
            made["pullRequestUrl"] = f"{self.server.url}/{name}/discussions/{number}"
        return self.answer(200, made)

    def change(self, files, key, value):
        path = value["path"]
        if key == "deletedFile":
            del files[path]
        elif key == "file":
            files[path] = self.server.keep(path, b64decode(value["content"]))
        else:
            size = (self.server.store / value["oid"]).stat().st_size
            lfs = {"oid": value["oid"], "size": size, "pointerSize": 134}
            files[path] = {"type": "file", "path": path, "size": size, "oid": value["oid"][:40], "lfs": lfs}

    def discussions(self, name):
        found, _ = self.repository(name)
        listed = [
            {"title": title, "num": number, "status": "open", "isPullRequest": True, "author": {"name": "me"},
             "createdAt": "2026-01-01T00:00:00.000Z", "repo": {"name": name, "type": "model"}}
            for number, title in found.titles.items()
        ]  # fmt: skip
        return self.answer(200, {"count": len(listed), "start": 0, "discussions": listed})

    def resolve(self, name, revision, path):
        found, commit = self.repository(name, revision)
        entry = commit and found.commits[commit].get(path)
        if not entry:
            return commit and self.answer(404, {}, {"X-Error-Code": "EntryNotFound"})
        oid = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        content, span = (self.server.store / oid).read_bytes(), self.headers.get("Range")
        headers = {"ETag": f'"{oid}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if span:
            first, _, last = span.removeprefix("bytes=").partition("-")
            part = content[int(first) : int(last) + 1 if last else None]
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
            return self.answer(206, part, headers)
        return self.answer(200, content, headers)


_NAME = r"([\w.-]+/[\w.-]+)"
_Handler.routes = (
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("GET", f"/api/models/{_NAME}", _Handler.info),
    ("GET", f"/api/models/{_NAME}/revision/(.+)", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/tree/(refs/pr/\d+|[^/]+)(?:/(.+))?", _Handler.tree),
    ("GET", f"/api/models/{_NAME}/discussions", _Handler.discussions),
    ("POST", f"/api/models/{_NAME}/branch/(.+)", _Handler.branch),
    ("POST", f"/api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    ("POST", f"/api/models/{_NAME}/commit/(.+)", _Handler.commit),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/store/([\w.]+)", _Handler.put),
    ("POST", r"/store/(\w+)/complete", _Handler.complete),
    ("GET", f"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("HEAD", f"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
)


def client_environment(hub: WritableHub, home: Path) -> dict[str, str]:
    """Return the environment of a process that pushes to a hub and reads from it, with its caches in `home`.

    Xet has servers of its own: this is the client's other way, LFS over HTTP.
    """
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    own = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    return kept | own | {"HF_ENDPOINT": hub.url}


@contextmanager
def writable(store: Path) -> Iterator[WritableHub]:
    """Run a `WritableHub` in a thread."""
    server = WritableHub(store)
    server.handle_error = lambda *args: None  # a cut connection is what a test asked for
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
