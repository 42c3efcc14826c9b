"""`reattend push`: the real client against a Hub on this machine, faults included."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import reattend
from hub_requests import TOKEN
from writable_hub import client_environment, writable

REATTEND = Path(sys.executable).with_name("reattend")
NAME = "org/model"


@pytest.fixture(scope="session")
def reported(models, tmp_path_factory):
    """An int8 output with its report; not to be changed."""
    out = tmp_path_factory.mktemp("reported") / "out"
    reattend.apply("int8", models("llama"), out)
    reattend.report(out, against=models("llama"))
    return out


@pytest.fixture
def out(reported, tmp_path):
    return shutil.copytree(reported, tmp_path / "out")


@pytest.fixture
def hub(tmp_path):
    (tmp_path / "store").mkdir()
    with writable(tmp_path / "store") as server:
        yield server


@pytest.fixture
def environment(hub, tmp_path):
    return client_environment(hub, tmp_path / "hf")


@pytest.fixture
def push(environment, out):
    """Push from the command line; nothing that it says may hold the token."""

    def call(*options, name=NAME, folder=out):
        command = [REATTEND, "push", folder, name, "--json", *options]
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, env=environment, check=False, timeout=60
        )
        assert TOKEN not in done.stdout + done.stderr
        return done

    return call


def local(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def succeeded(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_one_line(done, says, code):
    assert done.returncode == code, done
    errors = [line for line in done.stderr.splitlines() if not line.startswith("pushing: ")]
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith("reattend: error: ")
    assert says in errors[0], errors[0]
    assert not done.stdout


def stored_bytes(hub):
    return sum(sent for place, sent in hub.sent.items() if place.startswith("/store/"))


@pytest.mark.parametrize("multipart", [False, True], ids=["one part", "multipart"])
def test_what_is_pushed_is_what_lies_here(hub, push, out, environment, multipart, tmp_path):
    hub.multipart = multipart
    told = succeeded(push("--private"))
    assert hub.repositories[NAME].private
    assert hub.contents(NAME) == local(out) | {".gitattributes": b"*.safetensors filter=lfs\n"}
    assert told["commit"] == hub.repositories[NAME].branches["main"]
    assert told["files"] == told["files_sent"] == len(local(out))
    assert told["bytes"] == sum(map(len, local(out).values()))
    assert len(hub.repositories[NAME].commits) == 2  # one made it, one filled it
    again = succeeded(push())
    assert (again["commit"], again["files_sent"], again["bytes_sent"]) == (told["commit"], 0, 0)
    if not multipart:  # and what was pushed is a model like any other
        command = [REATTEND, "verify", NAME, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=60)
        assert succeeded(done)["problems"] == []


def test_a_dry_run_sends_nothing(hub, push, out):
    told = succeeded(push("--dry-run"))
    assert not hub.repositories
    assert not stored_bytes(hub)
    assert told["dry_run"] is True
    assert told["exists"] is False
    assert told["files_sent"] == len(local(out))


def test_a_branch_is_made_and_main_stays(hub, push, out):
    told = succeeded(push("--revision", "int8"))
    assert told["revision"] == "int8"
    assert local(out).items() <= hub.contents(NAME, "int8").items()
    assert set(hub.contents(NAME)) == {".gitattributes"}


def test_only_what_differs_is_sent_and_stale_weights_go(hub, push, out):
    kept = {"notes.txt": b"kept", "model.safetensors": (out / "model.safetensors").read_bytes()}
    stale = {"model.safetensors.index.json": b"{}", "model-00001-of-00002.safetensors": b"old"}
    hub.add(NAME, kept | stale | {"reattend.json": b"{}"})
    told = succeeded(push())
    assert hub.contents(NAME) == local(out) | {"notes.txt": b"kept"}
    assert told["files_sent"] == len(local(out)) - 1
    deleted, left, _ = told["remarks"]
    assert all(name in deleted for name in stale)
    assert left == "left as they are: notes.txt"


def test_a_card_that_loads_the_model_by_another_name_is_told(hub, push, out):
    (remark,) = succeeded(push("--dry-run"))["remarks"]
    assert "README.md loads the model by its folder's name" in remark
    command = remark[remark.index("reattend report") :].removesuffix(" names it")
    assert command == f"reattend report {out} --repository {NAME}"
    reattend.report(out, repository=NAME)
    assert succeeded(push())["remarks"] == ["left as they are: .gitattributes"]
    assert f'name = "{NAME}"' in hub.contents(NAME)["README.md"].decode()
    (remark,) = succeeded(push("--dry-run", name="org/other"))["remarks"]
    assert f"loads the model by {NAME}" in remark


def test_another_model_is_not_written_over(hub, push, out):
    before = {"config.json": b"{}", "model.safetensors": b"precious"}
    hub.add(NAME, before)
    check_one_line(push(), "holds config.json and 1 more files, which no reattend wrote", 2)
    assert hub.contents(NAME) == before
    succeeded(push("--overwrite"))
    assert hub.contents(NAME) == local(out)


def test_a_pull_request_is_opened_once(hub, push, out):
    hub.add(NAME, {"config.json": b"{}"})
    first, again = succeeded(push("--create-pr")), succeeded(push("--create-pr"))
    assert first["pull_request"] == again["pull_request"] == "refs/pr/1"
    assert first["commit"] == again["commit"]
    assert hub.contents(NAME) == {"config.json": b"{}"}
    assert hub.contents(NAME, "refs/pr/1") == local(out)
    (out / "README.md").write_text("another card")
    assert succeeded(push("--create-pr"))["pull_request"] == "refs/pr/2"


FAULTS = {
    "busy": {"refuse": {"^POST .*preupload": [429, 503], "^PUT ": [500]}},
    "dropped": {"drop": {"^PUT ": [20_000]}},
    "listing": {"refuse": {"^GET .*tree": [502]}},
    "commit": {"refuse": {"^POST .*commit": [503]}},
}


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_passing_fault_is_waited_out(hub, push, out, fault):
    for name, value in FAULTS[fault].items():
        setattr(hub, name, {pattern: list(each) for pattern, each in value.items()})
    succeeded(push())
    assert local(out).items() <= hub.contents(NAME).items()
    assert not any(left for faults in (hub.refuse, hub.drop) for left in faults.values())  # each was met


def test_slow_reads_are_no_fault(hub, push, out):
    hub.slow = 0.02
    succeeded(push())
    assert local(out).items() <= hub.contents(NAME).items()


LASTING = {
    "token refused": ("GET /api/models", 401, "the Hub does not take the token", 2),
    "no right to create": ("repos/create", 403, "can't be created: the token has no right to write there", 2),
    "no right to write": ("preupload", 403, "can't be sent: the token has no right to write there", 2),
    "server down": ("PUT ", 500, "can't be sent: the Hub answered 500; run it again to go on", 1),
    "commit refused": ("/commit/", 403, "the commit failed: the token has no right to write there", 2),
}


@pytest.mark.parametrize("fault", LASTING, ids=str)
def test_a_lasting_fault_is_one_line_and_nothing_is_seen_of_the_push(hub, push, environment, fault):
    pattern, status, says, code = LASTING[fault]
    hub.refuse = {pattern: [status] * 40}
    check_one_line(push(), says, code)
    for repository in hub.repositories.values():
        assert set(repository.commits[repository.branches["main"]]) <= {".gitattributes"}


def test_a_card_that_the_hub_refuses_is_named(hub, push):
    hub.card_errors = ['"license" must be one of a list']
    check_one_line(push(), 'README.md. - "license" must be one of a list', 2)


def test_the_token_is_in_no_traceback(hub, push):
    hub.refuse = {"preupload": [403] * 9}
    done = push("--debug")
    assert "Traceback" in done.stderr  # and `push` has looked for the token


def test_without_a_token_it_says_how_to_get_one(push, environment):
    del environment["HF_TOKEN"]
    check_one_line(push(), "no token to push with: run hf auth login, or set HF_TOKEN", 2)


def test_a_wrong_token_is_refused(push, environment):
    environment["HF_TOKEN"] = "hf_wrong"
    check_one_line(push(), "the Hub does not take the token", 2)


def test_no_network_is_one_line(hub, push, environment):
    environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    check_one_line(push(), "can't be looked at: ", 1)


def test_offline_nothing_is_asked(hub, push, environment):
    environment["HF_HUB_OFFLINE"] = "1"
    check_one_line(push(), "HF_HUB_OFFLINE is set", 2)
    assert not hub.asked


@pytest.mark.parametrize("name", ["model", "a b/c", "org/model/more", "org/-model"])
def test_a_name_that_cannot_be_is_refused(hub, push, name):
    check_one_line(push(name=name), name, 2)
    assert not hub.asked


def test_an_unverified_output_is_refused_before_the_hub_is_asked(hub, push, sound, out):
    check_one_line(push(folder=sound), "has no report.json, so nothing says that it was verified", 2)
    (out / "config.json").write_text("{}")
    assert push().returncode == 2
    (out / "reattend.json").unlink()
    check_one_line(push(), "it is no finished output of reattend apply", 2)
    assert not hub.asked


def test_someone_elses_commit_is_not_lost(hub, push, out):
    hub.add(NAME, {"reattend.json": b"{}"})
    hub.before_commit = lambda: hub.add(NAME, {"theirs.txt": b"theirs"})
    check_one_line(push(), "someone else committed to main meanwhile", 1)
    assert hub.contents(NAME) == {"reattend.json": b"{}", "theirs.txt": b"theirs"}
    sent = stored_bytes(hub)
    succeeded(push())
    assert hub.contents(NAME) == local(out) | {"theirs.txt": b"theirs"}
    assert stored_bytes(hub) == sent  # contents were there already


def test_a_commit_whose_answer_is_lost_is_made_once(hub, push):
    hub.add(NAME, {"reattend.json": b"{}"})
    hub.lose_answer = True
    commits = len(hub.repositories[NAME].commits)
    told = succeeded(push())
    assert told["commit"] == hub.repositories[NAME].branches["main"]
    assert len(hub.repositories[NAME].commits) == commits + 1


def test_what_differs_on_the_hub_afterwards_is_told(hub, push):
    hub.corrupt = {"model.safetensors"}
    check_one_line(push(), "model.safetensors differs from the file here; run it again", 1)


def test_killed_and_run_again_it_sends_what_was_missing(hub, push, out, environment):
    """Killed while a file is under way, the second run sends the rest: files that are there are not sent again."""
    hub.slow = 0.05
    large = [name for name, content in local(out).items() if len(content) >= 4096]
    process = subprocess.Popen([REATTEND, "push", out, NAME], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(hub.store.glob("?" * 64))) < len(large) // 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.2)
    there = {path.name for path in hub.store.glob("?" * 64)}
    assert 0 < len(there) < len(large)
    assert not hub.repositories[NAME].commits[hub.repositories[NAME].branches["main"]].keys() - {".gitattributes"}
    hub.slow, before = 0.0, dict(hub.sent)
    succeeded(push())
    assert local(out).items() <= hub.contents(NAME).items()
    again = {place for place, sent in hub.sent.items() if sent > before.get(place, 0) and place.startswith("/store/")}
    assert not {place.removeprefix("/store/") for place in again} & there
    assert not list(Path(environment["HF_HOME"]).rglob("*token*"))
