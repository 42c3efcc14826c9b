"""How the Hub of the tests reads requests, has faults and answers: what it holds is `writable_hub`'s."""

import json
import re
import time
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_test_token_that_must_not_be_seen"


class Requests(BaseHTTPRequestHandler):
    """Sends each request to the first of `routes` (method, pattern of the path, function) that takes it.

    The server's `refuse`, `drop` and `slow` are its faults, `asked` and `sent` what it is asked for.
    """

    protocol_version = "HTTP/1.1"
    routes = ()

    def route(self):
        parts = urlsplit(self.path)
        self.place, self.query = unquote(parts.path), parse_qs(parts.query)
        self.server.asked.append(f"{self.command} {self.place}")
        self.left = int(self.headers.get("Content-Length") or 0)
        for pattern, statuses in self.server.refuse.items():
            if statuses and re.search(pattern, self.server.asked[-1]):
                status = statuses.pop(0)
                self.take(None)
                return self.answer(status, {}, {"Retry-After": "0", "X-Error-Message": f"answer {status}"})
        if self.place.startswith("/api/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.take(None)
            return self.answer(401, {}, {"X-Error-Message": "Invalid credentials"})
        for method, pattern, act in self.routes:
            match = re.fullmatch(pattern, self.place)
            if match and method == self.command:
                return act(self, *match.groups())
        self.take(None)
        return self.answer(404, {}, {"X-Error-Code": "RepoNotFound"})

    do_GET = do_POST = do_PUT = do_HEAD = route

    def take(self, into) -> bytes:
        """Read the body block by block, to a file if one is given."""
        kept, read = [], 0
        limit = next(
            (s.pop(0) for p, s in self.server.drop.items() if s and re.search(p, self.server.asked[-1])), None
        )
        while self.left > 0:
            time.sleep(self.server.slow)
            if limit is not None and read >= limit:
                self.close_connection = True
                self.connection.close()
                raise ConnectionAbortedError
            block = self.rfile.read(min(self.left, 1 << 14))
            if not block:
                raise ConnectionAbortedError
            self.left -= len(block)
            read += len(block)
            self.server.sent[self.place] += len(block)
            into.write(block) if into else kept.append(block)
        return b"".join(kept)

    def answer(self, status, content, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        own = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        for key, value in (own | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args):
        pass
