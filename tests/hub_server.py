"""A Hub of one repository, org/demo, on this machine: what the real client asks for, and what was sent."""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "c0ffee" + "0" * 34
API, RESOLVE = "/api/models/org/demo", "/org/demo/resolve/"


class Hub(ThreadingHTTPServer):
    """Serves `folder`; `sent` counts body bytes per file, `whole` the times a file was sent whole.

    `broken` names files that are sent in parts only: whole they are answered with status 500. The next
    `busy` listings are answered with 503, after which the client is to ask again.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.sent: Counter[str] = Counter()
        self.whole: Counter[str] = Counter()
        self.broken: set[str] = set()
        self.busy = 0
        self.asked: list[str] = []

    def tree(self) -> list[dict[str, object]]:
        """Return the entries of a recursive listing."""
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return [
            {
                "type": "file",
                "path": p.relative_to(self.folder).as_posix(),
                "size": p.stat().st_size,
                "oid": blob_id(p),
            }
            for p in files
        ]


def blob_id(path: Path) -> str:
    """Return git's name for the content, which the Hub uses as ETag."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append(self.path)
        path = unquote(self.path.partition("?")[0])
        if path.startswith(f"{API}/tree/") and self.server.busy:
            self.server.busy -= 1
            self.answer(503, b"{}")
        elif path.startswith(f"{API}/tree/"):
            self.answer(200, json.dumps(self.server.tree()).encode())
        elif path == API or path.startswith(f"{API}/revision/"):
            asked = path.rpartition("/")[2]
            if asked not in ("demo", "main", "v1", COMMIT):
                return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            self.answer(200, json.dumps({"id": "org/demo", "sha": COMMIT, "siblings": []}).encode())
        elif path.startswith(RESOLVE):
            self.answer_file(path.removeprefix(RESOLVE).partition("/")[2])
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def do_HEAD(self):
        self.do_GET()

    def answer_file(self, name):
        path = self.server.folder / name
        if not path.is_file():
            return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        data, span = path.read_bytes(), self.headers["Range"]
        if self.command == "GET" and not span and name in self.server.broken:
            return self.answer(500, b"{}")
        headers = {"ETag": f'"{blob_id(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if span:
            first, _, last = span.removeprefix("bytes=").partition("-")
            part = data[int(first) : int(last) + 1 if last else None]
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
            self.count(self.server.sent, name, len(part))
            return self.answer(206, part, headers)
        self.count(self.server.sent, name, len(data))
        self.count(self.server.whole, name, 1)
        return self.answer(200, data, headers)

    def count(self, counter, name, number):
        if self.command == "GET":
            counter[name] += number

    def answer(self, status, data, headers=None):
        self.send_response(status)
        for key, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    """Run a `Hub` of `folder` in a thread."""
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
