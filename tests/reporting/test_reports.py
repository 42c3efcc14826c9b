"""What `report` says of an output, held against the commands that it prints."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import reattend
from reattend import Refusal, demo
from reattend.recipes.schema import load_recipe, override
from reattend.reporting.figures import per_layer, rows, sensitivities
from reattend.reporting.plots import plots
from reattend.reporting.record import verified_files

STEP = "steps: [{step: int8, keep: auto, keep_budget: 0.001}]"
SMALL = {"windows": 2, "selection_windows": 2, "window": 64}


def recipe(tmp_path, text=STEP):
    (tmp_path / "recipe.yaml").write_text(text)
    return load_recipe(tmp_path / "recipe.yaml")


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """The demo model in int8, one that leaves linears out by sensitivity, applied with `evaluate`."""
    place = tmp_path_factory.mktemp("reported")
    asked = {"text": str(demo.EVAL_TEXT), "window": 64, "windows": 3, "dtype": "float32", "outliers": True}
    settings = SMALL | {"selection": str(demo.SELECT_TEXT), "evaluate": asked}
    reattend.apply(override(recipe(place), settings), demo.MODEL, place / "out")
    return place / "out"


@pytest.fixture
def out(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "out")


def content(folder):
    return json.loads((folder / "report.json").read_text())


def run(command, **variables):
    env = (
        os.environ
        | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
        | variables
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done
    return json.loads(done.stdout)


def test_every_number_is_reproduced_by_the_command_that_the_report_prints(reported, tmp_path):
    told, again = content(reported), tmp_path / "again"
    places = {
        "OUT": reported,
        "MODEL": demo.MODEL,
        "TEXT": demo.EVAL_TEXT,
        "SELECTION": demo.SELECT_TEXT,
        "AGAIN": again,
    }
    assert set(told["variables"]) == set(places)
    commands = told["commands"]
    assert set(commands) == {"before", "after", "verification", "evaluation", "findings"}
    for section in ("before", "after", "verification", "evaluation"):
        found = run(commands[section], **{name: str(place) for name, place in places.items()})
        expected = {key: value for key, value in told[section].items() if key not in ("files", "text")}
        assert expected
        assert {key: found[key] for key in expected} == expected, section
    run(commands["findings"], **{name: str(place) for name, place in places.items()})
    assert json.loads((again / "reattend.json").read_text())["findings"] == told["findings"]


def test_the_report_shows_what_it_holds(reported):
    told, text = content(reported), (reported / "REPORT.md").read_text()
    for row in rows(told):
        assert f"| {row.what} | {row.before} | {row.after} |" in text
    assert "not measured" not in text
    assert f"{told['evaluation']['perplexity']:.3f} ± {told['evaluation']['perplexity_stderr']:.3f}" in text
    for command in told["commands"].values():
        assert command in text
    drawn = {path.name for path in (reported / "report").iterdir()}
    assert drawn == {f"{name}.png" for name in ("perplexity", "sizes", "layer_errors", "outliers", "sensitivity")}
    assert all(f"(report/{name})" in text for name in drawn)
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n") for path in (reported / "report").iterdir())


def test_no_place_on_this_machine_is_published(reported):
    for name in ("report.json", "REPORT.md", "README.md"):
        text = (reported / name).read_text()
        for place in (demo.MODEL, demo.EVAL_TEXT.parent, reported.parent):
            assert str(place) not in text


def test_the_same_numbers_are_drawn_as_the_same_bytes(reported):
    told = content(reported)
    drawn = plots(told)
    assert drawn == plots(told)
    assert drawn == {path.stem: path.read_bytes() for path in (reported / "report").iterdir()}


def test_measured_again_in_parts_an_output_keeps_what_stays_true(out, models):
    """One output, reported without its source, with it, again without, and after a change."""
    told = reattend.report(out)
    assert set(told["not_measured"]) == {
        "errors of logits and layers", "sizes before", "perplexity and cache", "outliers",
        "sensitivity of each linear layer to int8",
    }  # fmt: skip
    assert told["before"] is told["evaluation"] is None
    text = (out / "REPORT.md").read_text()
    assert "| perplexity | not measured | not measured |" in text
    assert "Perplexity was not measured." in text
    assert not (out / "report").exists()
    assert set(told["commands"]) == {"after", "verification"}
    with pytest.raises(Refusal, match="never compared with its source's; run reattend report"):
        verified_files(out)

    compared = reattend.report(out, against=models("llama"))
    assert compared["verification"]["logits_error"] > 0
    assert (out / "report" / "sizes.png").exists()
    assert reattend.report(out) == compared

    (out / "notes.txt").write_text("new")
    changed = reattend.report(out)
    assert "logits_error" not in changed["verification"]
    assert changed["before"] is None
    assert not list((out / "report").iterdir())  # no plot of what is not known


def test_an_unsound_output_is_reported_as_such(out, models):
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] - 1}))
    told = reattend.report(out, against=models("llama"))
    assert "unexpected_keys" in told["verification"]["problems"][0]
    assert told["verification"]["layer_errors"] is None
    assert "**Unsound: verification found " in (out / "REPORT.md").read_text()
    with pytest.raises(Refusal, match="verification found 'unexpected_keys"):
        verified_files(out)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"against": demo.MODEL}, "is not the source"),
        ({"base": "a b/c"}, "not the name of a model on the Hub"),
        ({"text": "absent.txt", "window": 64}, "absent.txt"),
        ({"text": demo.EVAL_TEXT, "window": 1}, "window"),
        ({"text": demo.EVAL_TEXT, "window": 64, "dtype": "int9"}, "dtype"),
    ],
)
def test_refusals_leave_the_output_as_it_was(out, options, says):
    before = sorted(out.rglob("*"))
    with pytest.raises(Refusal, match=says):
        reattend.report(out, **options)
    assert sorted(out.rglob("*")) == before


def test_what_is_no_output_is_refused(tmp_path, models):
    with pytest.raises(Refusal, match=r"has no reattend\.json"):
        reattend.report(models("llama"))
    with pytest.raises(Refusal, match="not a folder"):
        reattend.report(tmp_path / "absent")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "reattend.json").write_text("{}")
    with pytest.raises(Refusal, match=r"has no config\.json"):
        reattend.report(tmp_path / "broken")


@pytest.mark.parametrize(
    ("evaluate", "says"),
    [
        ({"text": str(demo.SELECT_TEXT)}, "shares text with the selection text"),
        ({"text": "absent.txt"}, "absent.txt"),
        ({"text": str(demo.EVAL_TEXT), "window": 4096}, "window: 4096 tokens"),
        ({"text": str(demo.EVAL_TEXT), "dtype": "int9"}, "int9"),
    ],
)
def test_what_could_not_be_evaluated_is_refused_before_the_work(tmp_path, evaluate, says):
    settings = SMALL | {"selection": str(demo.SELECT_TEXT), "evaluate": evaluate}
    with pytest.raises(Refusal, match=says):
        reattend.apply(override(recipe(tmp_path), settings), demo.MODEL, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("wrong", [{}, {"text": ""}, {"text": "a", "windows": 0}, {"text": "a", "depth": 1}, "a.txt"])
def test_evaluate_in_a_recipe_is_checked(tmp_path, wrong):
    with pytest.raises(Refusal, match="evaluate"):
        recipe(tmp_path, f"evaluate: {json.dumps(wrong)}\n{STEP}")


def test_an_output_stays_when_it_cannot_be_measured(tmp_path, monkeypatch):
    def broken(*args, **options):
        raise reattend.Failure("no logits")

    monkeypatch.setattr("reattend.reporting.measure.evaluate", broken)
    settings = {"evaluate": {"text": str(demo.EVAL_TEXT), "window": 64}}
    with pytest.raises(reattend.Failure, match=r"no logits; .*out is written, and has no report: reattend report "):
        reattend.apply(override(load_recipe("int8"), settings), demo.MODEL, tmp_path / "out")
    assert reattend.verify(tmp_path / "out")["problems"] == []


def test_lists_of_one_number_a_layer_are_found_wherever_they_stand():
    findings = [
        {"errors": [0.1, 0.2], "pairs": [1, 2], "long": [0.1, 0.2, 0.3]},
        {"kind": {"a_b": {"after": [1.0, 2.0]}}},
        {},
    ]
    assert per_layer(findings, 2) == {"errors": [0.1, 0.2], "kind a b after": [1.0, 2.0]}


def test_sensitivities_are_sorted_by_layer_and_kind():
    measured = {
        "model.layers.10.mlp.up_proj": 0.1,
        "model.layers.2.mlp.up_proj": 0.2,
        "model.layers.2.self_attn.q_proj": 0.3,
    }
    expected = {"mlp.up_proj": [(2, 0.2), (10, 0.1)], "self_attn.q_proj": [(2, 0.3)]}
    assert sensitivities([{}, {"sensitivity": measured}]) == expected
