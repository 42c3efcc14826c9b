"""report.json as the word of which bytes were verified."""

import hashlib
import json
import shutil

import pytest

import reattend
from reattend import Refusal
from reattend.checkpoint.index import fingerprint, open_checkpoint
from reattend.reporting.record import verified_files


@pytest.fixture
def out(told, tmp_path):
    return shutil.copytree(told, tmp_path / "out")


def test_every_file_is_listed_by_its_hash(out):
    files = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
    assert {"README.md", "REPORT.md", "report.json", "report/sizes.png", "model.safetensors"} < set(files)
    expected = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    assert verified_files(out) == expected


def add(out):
    (out / "more.txt").write_text("more")


def remove(out):
    (out / "generation_config.json").unlink()


def change(out):
    weights = bytearray((out / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (out / "model.safetensors").write_bytes(weights)


def forget(out):
    (out / "report.json").unlink()


def find_problems(out):
    report = json.loads((out / "report.json").read_text())
    report["verification"]["problems"] = ["tensor 'x' holds NaN or inf"]
    (out / "report.json").write_text(json.dumps(report))


def damage(out):
    (out / "report.json").write_text('{"verification": []}')


def link(out):
    (out / "elsewhere").symlink_to(out / "nowhere")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (add, r"more\.txt: is new since the output was verified; run reattend report"),
        (remove, r"generation_config\.json: is gone since"),
        (change, r"model\.safetensors: was changed since"),
        (forget, r"has no report\.json"),
        (find_problems, r"verification found .tensor 'x' holds NaN"),
        (damage, r"report\.json: is damaged"),
        (link, r"elsewhere: is a link to nothing"),
    ],
    ids=lambda fault: getattr(fault, "__name__", ""),
)
def test_what_is_not_as_verified_is_refused(out, fault, says):
    fault(out)
    with pytest.raises(Refusal, match=says):
        verified_files(out)


def test_a_card_may_be_edited(out):
    with (out / "README.md").open("a") as card:
        card.write("\nMore.\n")
    assert verified_files(out)["README.md"] == hashlib.sha256((out / "README.md").read_bytes()).hexdigest()


def test_a_report_leaves_the_model_what_it_is(out):
    after = fingerprint(open_checkpoint(out))
    shutil.rmtree(out / "report")
    for name in ("report.json", "REPORT.md", "README.md"):
        (out / name).unlink()
    (out / "SOURCE_README.md").rename(out / "README.md")
    assert fingerprint(open_checkpoint(out)) == after


def test_what_is_made_of_an_output_does_not_carry_its_report(out, tmp_path):
    planned = _next(out, tmp_path)
    assert any(
        remark.startswith("not copied, as they tell of the source alone: README.md, ") for remark in planned.remarks
    )
    names = {path.relative_to(tmp_path / "next").as_posix() for path in (tmp_path / "next").rglob("*")}
    assert not names & {"README.md", "REPORT.md", "report.json", "report"}
    earlier = json.loads((tmp_path / "next" / "reattend.json").read_text())["earlier"]
    assert [run["recipe"]["steps"][0]["step"] for run in earlier] == ["int8"]
    assert earlier[0]["engines"]["vllm"] == "yes"


def _next(out, tmp_path):
    recipe = tmp_path / "layout.yaml"
    recipe.write_text("steps: [{step: int8_layout, format: bitsandbytes}]")
    return reattend.apply(recipe, out, tmp_path / "next")
