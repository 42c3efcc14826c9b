"""`plan` on a Hub id: the real client against a small server on this machine, headers only."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from reattend import demo

REATTEND = Path(sys.executable).with_name("reattend")


@pytest.fixture
def hub():
    """Serve the demo model as org/demo; `server.sent` counts bytes per file."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0]
            if path == "/api/models/org/demo/tree/main":
                files = [f for f in demo.MODEL.iterdir() if f.is_file()]
                entries = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files]
                self.answer(200, json.dumps(entries).encode())
            elif path.startswith("/org/demo/resolve/main/"):
                self.answer_range(path.rsplit("/", 1)[1])
            else:
                self.answer(404, b"{}")

        def answer_range(self, name):
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            data = (demo.MODEL / name).read_bytes()[first : last + 1]
            server.sent[name] = server.sent.get(name, 0) + len(data)
            self.answer(206, data)

        def answer(self, status, data):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.sent = {}
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def plan(hub, name):
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0"}
    command = [REATTEND, "plan", "int8", name, "--json"]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def test_a_remote_plan_equals_the_local_one_and_reads_headers_only(hub):
    remote = plan(hub, "org/demo")
    assert remote.returncode == 0, remote.stderr
    local = json.loads(plan(hub, str(demo.MODEL)).stdout)
    assert json.loads(remote.stdout) == local | {"model": "org/demo"}
    assert hub.sent["model.safetensors"] < 10_000
    assert set(hub.sent) == {"model.safetensors", "config.json"}


def test_an_unknown_repository_is_one_line(hub):
    done = plan(hub, "org/absent")
    assert done.returncode == 1
    assert done.stderr.startswith("reattend: error: org/absent: ")
    assert done.stderr.count("\n") == 1
