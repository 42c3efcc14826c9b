import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from reattend import demo
from reattend.cli import cli

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


def test_an_error_is_one_line_and_exit_2(tmp_path):
    for arguments in (
        ("plan", "int8", tmp_path),
        ("inspect", "/no/such"),
        ("recipes", "show", "x"),
        ("verify", demo.MODEL),
    ):
        done = run(*arguments)
        assert done.returncode == 2, done
        assert done.stderr.startswith("reattend: error: ")
        assert done.stderr.count("\n") == 1
        assert not done.stdout


def test_inspect_and_plan_as_json():
    looked = json.loads(run("inspect", demo.MODEL, "--json").stdout)
    assert (looked["family"], looked["layers"], looked["kv_heads"], looked["tied_embeddings"]) == (
        "llama",
        5,
        2,
        True,
    )
    assert looked["cache_bytes_per_token"] == 5 * 2 * 2 * 32 * 2
    planned = json.loads(run("plan", "int8", demo.MODEL, "--json").stdout)
    assert planned["steps"][0]["tensors_rewritten"] == 5 * 7
    assert planned["bytes_before"] == looked["bytes"]


def test_convert_equals_apply(tmp_path):
    assert run("convert", "int8", demo.MODEL, tmp_path / "a", "--set", "format=bitsandbytes").returncode == 0
    assert run("apply", "int8-bitsandbytes", demo.MODEL, tmp_path / "b").returncode == 0
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    # The recipe that was saved gives the same output again.
    assert run("apply", tmp_path / "a/recipe.yaml", demo.MODEL, tmp_path / "c").returncode == 0
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


def test_recipes(tmp_path):
    assert set(json.loads(run("recipes", "list", "--json").stdout)) == {
        "int8",
        "int8-bitsandbytes",
        "int8-smooth",
        "int8-weights",
    }
    assert run("recipes", "copy", "int8", tmp_path / "r.yaml").returncode == 0
    assert run("recipes", "copy", "int8", tmp_path / "r.yaml").returncode == 2
    assert (tmp_path / "r.yaml").read_text() == run("recipes", "show", "int8").stdout
    assert json.loads(run("recipes", "schema").stdout)["properties"]["steps"]
