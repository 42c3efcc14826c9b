"""Commands on a Hub id: the real client against a small server on this machine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import reattend
from hub_server import COMMIT, serving
from reattend import demo
from reattend.pipeline.inspection import inspect
from reattend.texts.reading import read_text

REATTEND = Path(sys.executable).with_name("reattend")
# What is no part of the checkpoint, and what only looks as if it were not.
IGNORED = (
    "pytorch_model.bin",
    "demo-q4.gguf",
    "consolidated.safetensors",
    "original/demo.00.pth",
    "onnx/demo.onnx_data",
)
ODD = ("README.md", "notes [1].txt", "notes/extra*.txt")


@pytest.fixture
def hub(tmp_path):
    folder = shutil.copytree(demo.MODEL, tmp_path / "hub")
    for name in (*IGNORED, *ODD):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(name.encode() * 100)
    with serving(folder) as server:
        yield server


@pytest.fixture
def environment(hub, tmp_path):
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    own = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}  # a cache of its own
    return env | own | {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"}


@pytest.fixture
def run(environment):
    def call(*arguments):
        command = [REATTEND, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=240)

    return call


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def check_one_line(done, start, code=1):
    assert done.returncode == code, done
    assert done.stderr.startswith(f"reattend: error: {start}")
    assert done.stderr.count("\n") == 1
    assert not done.stdout


@pytest.mark.parametrize("command", [("plan", "int8"), ("inspect",)], ids=["plan", "inspect"])
def test_reading_a_repository_equals_reading_a_folder_and_needs_headers_only(hub, run, command):
    remote = run(*command, "org/demo", "--json")
    assert remote.returncode == 0, remote.stderr
    local = inspect(hub.folder) if command == ("inspect",) else reattend.plan("int8", hub.folder).summary()
    assert json.loads(remote.stdout) == json.loads(json.dumps(local)) | {"model": "org/demo"}
    assert hub.sent["model.safetensors"] < 10_000
    assert set(hub.sent) == {"model.safetensors", "config.json"}


def test_applied_to_a_repository_the_output_is_that_of_the_folder(hub, run, tmp_path):
    remote = run("apply", "int8", "org/demo", tmp_path / "remote")
    assert remote.returncode == 0, remote.stderr
    reattend.apply("int8", hub.folder, tmp_path / "local")
    written, local = contents(tmp_path / "remote"), contents(tmp_path / "local")
    told, expected = (json.loads(files.pop("reattend.json")) for files in (written, local))
    assert written == local
    assert told == expected | {"base": {"model": "org/demo", "revision": COMMIT}}
    assert set(ODD) < set(written)
    assert not set(IGNORED) & (set(hub.sent) | set(written))
    assert hub.whole["model.safetensors"] == 1
    assert all(line.startswith("rewriting: ") for line in remote.stderr.splitlines())
    checked = run("verify", tmp_path / "remote", "--against", "org/demo", "--json")
    assert json.loads(checked.stdout)["problems"] == []


def test_a_revision_is_pinned_and_told(hub, run, tmp_path):
    done = run("apply", "int8", "org/demo@v1", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    base = json.loads((tmp_path / "out" / "reattend.json").read_text())["base"]
    assert base == {"model": "org/demo", "revision": COMMIT}
    # What is read after the revision was looked up is of the commit, whatever the branch is by then.
    read = [path for path in hub.asked if "/tree/" in path or "/resolve/" in path]
    assert read
    assert all(COMMIT in path for path in read)
    check_one_line(run("inspect", "org/demo@v2"), "org/demo@v2: no such folder here, and the Hub answers: ")


def test_offline_a_repository_is_what_the_cache_holds(hub, run, environment, tmp_path):
    assert run("apply", "int8", "org/demo", tmp_path / "out").returncode == 0
    asked = len(hub.asked)
    environment["HF_HUB_OFFLINE"] = "1"
    for name in ("org/demo", f"org/demo@{COMMIT}"):
        done = run("plan", "int8", name, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["bytes_before"] == reattend.plan("int8", hub.folder).summary()["bytes_before"]
    assert len(hub.asked) == asked
    check_one_line(run("inspect", "org/absent"), "org/absent: no such folder here, and the Hub answers: ")


def test_evaluating_a_repository_equals_evaluating_the_folder(hub, run):
    def measured(model):
        flags = ("--window", "64", "--windows", "1", "--dtype", "float32", "--json")
        done = run("eval", model, "--text", demo.EVAL_TEXT, *flags)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert measured("org/demo") == measured(hub.folder) | {"model": "org/demo"}
    assert not set(IGNORED) & set(hub.sent)


def test_a_failing_download_is_one_line_and_leaves_nothing(hub, run, tmp_path):
    hub.broken.add("model.safetensors")
    (tmp_path / "place").mkdir()
    check_one_line(run("apply", "int8", "org/demo", tmp_path / "place" / "out"), "org/demo: cannot be downloaded: ")
    assert not list((tmp_path / "place").iterdir())
    # The next run takes up what was downloaded.
    hub.broken.clear()
    assert run("apply", "int8", "org/demo", tmp_path / "place" / "out").returncode == 0
    assert hub.whole["tokenizer.json"] == 1


def test_an_unsound_repository_is_refused_before_its_weights_are_downloaded(hub, run, tmp_path):
    path = hub.folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    check_one_line(
        run("apply", "int8", "org/demo", tmp_path / "out"), "org/demo/model.safetensors: truncated", code=2
    )
    assert not hub.whole


@pytest.mark.parametrize("command", [("plan", "int8"), ("inspect",), ("apply", "int8")], ids=lambda c: c[0])
def test_an_unknown_repository_is_one_line(run, tmp_path, command):
    out = [tmp_path / "out"] if command[0] == "apply" else []
    check_one_line(run(*command, "org/absent", *out), "org/absent: ")


def test_a_busy_hub_is_asked_again_without_a_word(hub, run):
    hub.busy = 1
    done = run("inspect", "org/demo")
    assert done.returncode == 0, done.stderr
    assert not hub.busy
    assert not done.stderr


def test_no_connection_is_a_failure_that_names_the_file(hub, environment):
    hub.server_close()
    code = "from reattend.checkpoint.files import HubRepository as H; h = H('org/demo'); h.commit = 'main'; h.read('config.json', 0, 9)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("reattend.errors.Failure: org/demo/config.json: cannot be read: ")
    assert "refused" in last


def test_offline_a_hub_id_is_one_line(run, environment):
    environment["HF_HUB_OFFLINE"] = "1"
    check_one_line(run("inspect", "org/demo"), "org/demo: no such folder here, and the Hub answers: ")


def test_an_output_on_the_hub_is_verified_and_its_texts_are_known(hub, run):
    reattend.apply("int8", demo.MODEL, hub.folder.parent / "out")
    shutil.rmtree(hub.folder)
    (hub.folder.parent / "out").rename(hub.folder)
    checked = run("verify", "org/demo", "--json")
    assert checked.returncode == 0, checked.stderr
    assert json.loads(checked.stdout)["problems"] == []
    record = json.loads((hub.folder / "reattend.json").read_text())
    record["texts"] = {"calibration": read_text(demo.EVAL_TEXT).sha256}
    (hub.folder / "reattend.json").write_text(json.dumps(record))
    done = run("eval", "org/demo", "--text", demo.EVAL_TEXT, "--window", "64")
    check_one_line(done, f"{demo.EVAL_TEXT}: shares text with the calibration text of org/demo", code=2)
