import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from click.testing import CliRunner

import reattend
from reattend import demo
from reattend.cli import cli, main
from reattend.cli.console import progress
from reattend.errors import Failure
from reattend.recipes.schema import load_recipe

REATTEND = Path(sys.executable).with_name("reattend")


def run(*arguments):
    return subprocess.run([REATTEND, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_help_imports_no_torch():
    code = "import sys, reattend.cli; sys.argv = ['reattend', '--help']\ntry: reattend.cli.main()\nexcept SystemExit: print(sorted(m for m in ('torch', 'transformers', 'pydantic', 'rich') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    assert "inspect" in done.stdout


def test_every_command_has_help():
    for name, command in cli.commands.items():
        assert CliRunner().invoke(cli, [name, "--help"]).exit_code == 0
        assert command.help


def call(monkeypatch, capsys, *arguments):
    """Run the command line in this process; return the exit code, standard output and standard error."""
    environment = dict(os.environ)
    monkeypatch.setattr(sys, "argv", ["reattend", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught, warnings.catch_warnings():
        main()
    os.environ.clear()
    os.environ.update(environment)
    return caught.value.code, *capsys.readouterr()


FOLDER = demo.MODEL.parent
MISTAKES = {
    ("plan", "int8", FOLDER): "has no config.json",
    ("inspect", "/no/such"): "/no/such: not a folder",
    ("recipes", "show", "x"): "no such recipe",
    ("verify", demo.MODEL): "has no reattend.json",
    ("plan", FOLDER, demo.MODEL): "is a folder, expected a recipe's YAML file",
    ("plan", FOLDER / "absent.yaml", demo.MODEL): "no such recipe; built in are",
    ("plan",): "Missing argument 'RECIPE'",
    ("plan", "int8"): "(see reattend plan --help)",
    ("nothing",): "No such command 'nothing'",
    ("inspect", demo.MODEL, "--what"): "No such option",
    ("inspect", ""): "'MODEL': it is empty",
    ("plan", "", demo.MODEL): "'RECIPE': it is empty",
    ("apply", "int8", demo.MODEL, ""): "'OUT': it is empty",
    ("apply", "int8", demo.MODEL, "out", "--calibration", ""): "'--calibration': it is empty",
    ("apply", "int8", demo.MODEL, "out", "--device", ""): "'--device': it is empty",
    ("apply", "int8", demo.MODEL, "out", "--windows", "0"): "'--windows'",
    ("apply", "int8", demo.MODEL, "out", "--window", "1"): "'--window'",
    ("apply", "int8", demo.MODEL, "out", "--selection-windows", "x"): "'--selection-windows'",
    ("eval", demo.MODEL, "--text", ""): "'--text': it is empty",
    ("recipes", "copy", "int8", ""): "'FILE': it is empty",
    ("convert", "int8", demo.MODEL, "out", "--set", "x"): "expected KEY=VALUE",
    ("convert", "int8", demo.MODEL, "out", "--set", "keep=" + "[" * 5000): "--set keep=[",
    ("convert", "int8", demo.MODEL, "out", "--set", "keep=2024-13-45"): "not valid YAML (month must be",
    ("convert", "int8", demo.MODEL, "out", "--set", "select=*.mlp.*"): "starts with * or & needs quotes",
    ("convert", "int8", demo.MODEL, "out", "--set", "select=mlp"): "select: Input should be a valid",
    ("convert", "int8", demo.MODEL, "out", "--set", "keep=[a]", "--set", "keep=[b]"): "keep is set twice",
}


@pytest.mark.parametrize(("arguments", "words"), MISTAKES.items(), ids=lambda value: " ".join(map(str, value))[:40])
def test_a_mistake_is_one_line_and_exit_2(monkeypatch, capsys, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, printed, told = call(monkeypatch, capsys, *arguments)
    assert (code, printed) == (2, "")
    assert told.startswith("reattend: error: ")
    assert words in told
    assert told.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_a_list_looks_like_is_told(monkeypatch, capsys):
    _, _, told = call(monkeypatch, capsys, "convert", "int8", demo.MODEL, "out", "--set", "select=mlp")
    assert told.endswith("written as [a, b], not 'mlp'\n")


def test_nothing_asked_for_prints_the_help(monkeypatch, capsys):
    code, printed, told = call(monkeypatch, capsys)
    assert code == 2
    assert "inspect" in printed + told
    assert call(monkeypatch, capsys, "--version") == (0, f"reattend, version {reattend.__version__}\n", "")


@pytest.mark.parametrize("arguments", [("--debug", "inspect", "/no/such"), ("inspect", "/no/such", "--debug")])
def test_debug_shows_the_traceback(monkeypatch, capsys, arguments):
    code, _, told = call(monkeypatch, capsys, *arguments)
    assert code == 2
    assert "Traceback" in told
    code, _, told = call(monkeypatch, capsys, "inspect", "--", "--debug")
    assert (code, told.count("\n")) == (2, 1)


def raising(error):
    def function(*arguments, **options):
        raise error

    return function


def test_what_is_not_foreseen_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(reattend, "evaluate", raising(KeyError("many\nlines")))
    code, printed, told = call(monkeypatch, capsys, "eval", demo.MODEL, "--text", "x")
    assert (code, printed, told.count("\n")) == (1, "", 1)
    assert told.startswith("reattend: error: KeyError: ")


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_is_one_line_and_releases_what_was_held(tmp_path, name, code):
    (tmp_path / "held").mkdir()
    script = (
        "import os, shutil, signal, weakref, reattend, reattend.cli\n"
        f"signal.signal(signal.{name}, signal.SIG_DFL)\n"  # a test run in the background ignores some
        "class Model: pass\n"
        "model = Model()\n"
        f"weakref.finalize(model, shutil.rmtree, {str(tmp_path / 'held')!r})\n"
        f"reattend.apply = lambda *a, **k: os.kill(os.getpid(), signal.{name})\n"
        f"import sys; sys.argv = ['reattend', 'apply', 'int8', {str(demo.MODEL)!r}, 'out']\n"
        "reattend.cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr == "reattend: error: interrupted: --resume goes on with what was written\n"
    assert not (tmp_path / "held").exists()


def test_an_interruption_by_an_exception(monkeypatch, capsys):
    monkeypatch.setattr(reattend, "evaluate", raising(KeyboardInterrupt()))
    code, printed, told = call(monkeypatch, capsys, "eval", demo.MODEL, "--text", "x")
    assert (code, printed, told.strip()) == (130, "", "reattend: error: interrupted")


@pytest.mark.parametrize(
    ("redirection", "code"),
    [(">&-", 1), (">/dev/full", 1), ("2>&-", 0), ("2>/dev/full", 0), (">&- 2>&-", 1), ("| (exec <&-; sleep 1)", 1)],
)
def test_streams_that_take_nothing(redirection, code):
    line = f"set -o pipefail; (sleep 0.3; exec {shlex.quote(str(REATTEND))} recipes schema) {redirection}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr.count("\n") <= 1
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_a_failing_run_with_nowhere_to_tell_it():
    line = f"{shlex.quote(str(REATTEND))} inspect /no/such 2>/dev/full"
    assert subprocess.run(["bash", "-c", line], check=False).returncode == 2


def test_json_has_null_for_what_is_no_number(monkeypatch, capsys):
    report = {"perplexity": math.inf, "windows": [{"kl": math.nan}, (1.5, None)]}
    monkeypatch.setattr(reattend, "evaluate", lambda *a, **k: report)
    code, printed, _ = call(monkeypatch, capsys, "eval", demo.MODEL, "--text", "x", "--json")
    assert code == 0
    assert json.loads(printed) == {"perplexity": None, "windows": [{"kl": None}, [1.5, None]]}


def test_the_settings_of_the_recipe_can_be_given(monkeypatch, capsys):
    seen = []

    def apply(recipe, *arguments, **options):
        seen.append(recipe)
        raise Failure("stop")

    monkeypatch.setattr(reattend, "apply", apply)
    settings = ("--windows", "3", "--selection-windows", "2", "--window", "32", "--calibration", "a.txt")
    for start in (("apply", "int8-smooth"), ("convert", "int8")):
        call(monkeypatch, capsys, *start, demo.MODEL, "out", *settings)
        call(monkeypatch, capsys, *start, demo.MODEL, "out")
    for given, default in (seen[:2], seen[2:]):
        assert (given.windows, given.selection_windows, given.window, given.calibration) == (3, 2, 32, "a.txt")
        assert given.steps == default.steps
        assert default.window == 1024
    assert (seen[1].windows, seen[3].windows) == (load_recipe("int8-smooth").windows, 64)
    code, _, told = call(monkeypatch, capsys, "apply", "int8", demo.MODEL, "out", "--calibration", "\udcff")
    assert (code, told.count("\n")) == (2, 1)
    assert "UTF-8" in told


RECIPES = {
    "steps: [{step: int8}]\nwindows: 3\nwindows: 4": "the key 'windows' stands twice",
    "steps: [{step: int8, keep: [a], keep: [b]}]": "the key 'keep' stands twice",
    "steps: [{step: int8}]\nwindows: true": "windows: Input should be a valid integer, not True",
    "steps: [{step: int8}]\nwindows: '3'": "windows: Input should be a valid integer, not '3'",
    "steps: [{step: int8}]\nwindow: 3.0": "window: Input should be a valid integer, not 3.0",
    "steps: [{step: int8}]\nseed: 9223372036854775808": "seed: Input should be less than or equal to",
    "steps: [{step: int8}]\nseed: " + "9" * 5000: "not valid YAML",
    "steps: [{step: int8}]\ndescription: 2024-13-45": "month must be",
    'steps: [{step: int8}]\ndescription: "\\ud800"': "UTF-8",
    'steps: [{step: int8, keep: ["\\ud800"]}]': "UTF-8",
    "steps: [{step: int8, select: mlp}]": "written as [a, b], not 'mlp'",
    "steps: " + "[" * 5000: "nested too deeply",
}


@pytest.mark.parametrize(("text", "words"), RECIPES.items(), ids=range(len(RECIPES)))
def test_a_bad_recipe_is_one_line_that_names_the_file(monkeypatch, capsys, tmp_path, text, words):
    (tmp_path / "r.yaml").write_text(text)
    code, printed, told = call(monkeypatch, capsys, "plan", tmp_path / "r.yaml", demo.MODEL)
    assert (code, printed, told.count("\n")) == (2, "", 1), told
    assert told.startswith(f"reattend: error: {tmp_path}/r.yaml: ")
    assert words in told
    assert len(told) < 1000


def test_a_recipe_that_cannot_be_read_is_named(monkeypatch, capsys, tmp_path):
    read_text = Path.read_text

    def refuse(path, *arguments):
        if path.name == "r.yaml":
            raise PermissionError(13, "Permission denied")
        return read_text(path, *arguments)

    monkeypatch.setattr(Path, "read_text", refuse)
    code, _, told = call(monkeypatch, capsys, "plan", tmp_path / "r.yaml", demo.MODEL)
    assert (code, told) == (2, f"reattend: error: {tmp_path}/r.yaml: Permission denied\n")


def test_a_phase_that_starts_again_is_timed_anew(monkeypatch, capsys):
    times = iter(range(0, 1000, 10))
    now = [0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress() as report:
        for done in (0, 50, 100, 0, 50, 100):
            report("rewriting", done, 100)
            now[0] = next(times) + 10
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition(", ")[2] for line in lines] == ["10.0 s", "20.0 s", "10.0 s", "20.0 s"]


def resumed(report, now):
    """Tell of a run that found 6 of 10 MB done, and does 2 MB in each of two seconds."""
    for done in (6_000_000, 8_000_000, 10_000_000):
        report("rewriting", done, 10_000_000)
        now[0] += 1


def test_the_rate_of_a_resumed_run_is_that_of_its_own_bytes(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress() as report:
        resumed(report, now)
    assert capsys.readouterr().err.splitlines() == [
        "rewriting: 6.0 MB of 10.0 MB, 0.0 s",
        "rewriting: 8.0 MB of 10.0 MB, 2.0 MB/s, 1.0 s",
        "rewriting: 10.0 MB of 10.0 MB, 2.0 MB/s, 2.0 s",
    ]


def test_the_bar_of_a_resumed_run_starts_where_the_earlier_one_ended(monkeypatch):
    import rich.progress

    made, now = [], [0.0]

    class Bars(rich.progress.Progress):
        def __init__(self, *columns, **options):
            super().__init__(*columns, **options, get_time=lambda: now[0])
            made.append(self)

    monkeypatch.setattr(rich.progress, "Progress", Bars)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress() as report:
        for _ in range(2):  # as each step of a recipe does
            resumed(report, now)
            task = made[0].tasks[0]
            assert (task.completed, task.total, task.speed) == (10_000_000, 10_000_000, 2_000_000)
            assert task.fields["amount"] == "10.0 MB of 10.0 MB, 2.0 MB/s"


def printed_json(monkeypatch, capsys, *arguments):
    code, printed, told = call(monkeypatch, capsys, *arguments, "--json")
    assert code == 0, told
    return json.loads(printed)


def test_inspect_and_plan_as_json(monkeypatch, capsys):
    looked = printed_json(monkeypatch, capsys, "inspect", demo.MODEL)
    assert (looked["family"], looked["layers"], looked["kv_heads"], looked["tied_embeddings"]) == (
        "llama",
        5,
        2,
        True,
    )
    assert looked["cache_bytes_per_token"] == 5 * 2 * 2 * 32 * 2
    planned = printed_json(monkeypatch, capsys, "plan", "int8", demo.MODEL)
    assert planned["steps"][0]["tensors_rewritten"] == 5 * 7
    assert planned["bytes_before"] == looked["bytes"]


def test_plan_of_large_groups_reads(monkeypatch, capsys, tmp_path):
    """A block of layers is a group of many tensors, which keep their names and shapes."""
    (tmp_path / "recipe.yaml").write_text("window: 64\nsteps:\n  - {step: dictionary, solver: pca}\n")
    code, printed, _ = call(monkeypatch, capsys, "plan", tmp_path / "recipe.yaml", demo.MODEL)
    assert code == 0
    assert " and 17 more -> the same, other values" in printed


def test_remarks_are_told_in_words_and_as_json(monkeypatch, capsys, tmp_path):
    folder = shutil.copytree(demo.MODEL, tmp_path / "in")
    (folder / "extra").symlink_to("nowhere")
    remark = "not copied: extra (a link to nothing)"
    for arguments in (("plan", "int8", folder), ("apply", "int8", folder, tmp_path / "out", "--overwrite")):
        code, printed, _ = call(monkeypatch, capsys, *arguments, "--json")
        assert (code, remark in json.loads(printed)["remarks"]) == (0, True)
        code, printed, _ = call(monkeypatch, capsys, *arguments)
        assert (code, remark in printed) == (0, True)


def test_convert_equals_apply(monkeypatch, capsys, tmp_path):
    def done(*arguments):
        return call(monkeypatch, capsys, *arguments)[0] == 0

    assert done("convert", "int8", demo.MODEL, tmp_path / "a", "--set", "format=bitsandbytes")
    assert done("apply", "int8-bitsandbytes", demo.MODEL, tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    # The recipe that was saved gives the same output again.
    assert done("apply", tmp_path / "a/recipe.yaml", demo.MODEL, tmp_path / "c")
    assert (tmp_path / "c/reattend.json").read_bytes() == (tmp_path / "a/reattend.json").read_bytes()


def test_demo(tmp_path):
    done = run("demo", "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["problems"] == []
    assert abs(report["delta"]) < 0.03 * report["base_perplexity"]
    assert report["delta_stderr"] > 0
    assert report["bytes_after"] < 0.62 * report["bytes_before"]


@pytest.mark.parametrize("recipe", ["int8", "int8-bitsandbytes"])
def test_other_libraries_keep_off_the_terminal(tmp_path, recipe):
    out, measure = tmp_path / "out", ("--text", demo.EVAL_TEXT, "--window", "64", "--windows", "1")
    calls = {
        "rewriting: ": ("apply", recipe, demo.MODEL, out),
        "logits were not compared": ("verify", out),
        "evaluating: ": ("eval", out, "--against", demo.MODEL, *measure),
    }
    for ours, arguments in calls.items():
        done = run(*arguments)
        assert done.returncode == 0, done.stderr
        lines = done.stderr.splitlines()
        assert lines, arguments
        assert all(line.startswith(ours) for line in lines), done.stderr


def test_recipes(monkeypatch, capsys, tmp_path):
    names = {
        "attention-drop",
        "attention-sharing",
        "dictionary",
        "portable",
        "gates",
        "clipped-softmax",
        "heal",
        "int8",
        "int8-bitsandbytes",
        "int8-attention",
        "int8-smooth",
        "int8-weights",
        "mla",
    }
    assert set(printed_json(monkeypatch, capsys, "recipes", "list")) == names
    assert call(monkeypatch, capsys, "recipes", "copy", "int8", tmp_path / "r.yaml")[0] == 0
    assert call(monkeypatch, capsys, "recipes", "copy", "int8", tmp_path / "r.yaml")[0] == 2
    assert call(monkeypatch, capsys, "recipes", "show", "int8")[:2] == (0, (tmp_path / "r.yaml").read_text())
    code, printed, _ = call(monkeypatch, capsys, "recipes", "schema")
    assert json.loads(printed)["properties"]["steps"]
    assert code == 0
