"""Every command of the README and the docs, run on the bundled model.

What is said of a large model is made to fit a small one by `SMALLER`, and nothing else is changed.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import reattend
from pairs import disturb
from reattend import demo
from reattend.cli import cli
from writable_hub import client_environment, writable

ROOT = Path(__file__).parents[1]
REATTEND = Path(sys.executable).with_name("reattend")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Numbers of a model of 30 layers and of texts of megabytes, and what stands in their place.
SMALLER = {
    "latent_rank=512": "latent_rank=48", "rope_dim=64": "rope_dim=8", "followers=7": "followers=1", "count=7": "count=1",
    "pairs={7: 6, 15: 14}": "pairs={2: 1, 4: 3}", "steps=1000": "steps=2", "batch=16": "batch=2", "1024": "64",
    "--windows 20": "--windows 2", "--windows 8": "--windows 2", "hellaswag,arc_easy": "my_task --harness-tasks FOLDER",
}  # fmt: skip
FEW = ["--windows", "2", "--selection-windows", "2", "--window", "64"]
SHORT = ["--window", "32", "--selection-windows", "2", "--set", "micro_batch=1"]
TASK = """
task: my_task
dataset_path: json
dataset_kwargs: {data_files: {test: tasks.json}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
STOCK = """
import json, sys
sys.modules["reattend"] = None  # its import fails
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
print(json.dumps(model(**tokenizer("The river rises in the hills", return_tensors="pt")).logits[0, -1].tolist()))
"""


def commands(start):
    """The commands of all pages that begin like this, without their comments, each once."""
    found = {}
    for page in PAGES:
        for line in re.findall(rf"^    ({start} .+)$", page.read_text("utf-8"), re.M):
            found.setdefault(re.sub(r"\s+#.*$", "", line), page.name)
    return list(found)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """An output in int8 and one with gates: what commands read that are given OUT."""
    place = tmp_path_factory.mktemp("outputs")
    for name, recipe in (("int8", "int8"), ("open", "gates")):
        reattend.apply(recipe, demo.MODEL, place / name)
    reattend.report(place / "int8", against=demo.MODEL)
    return place


@pytest.fixture
def world(models, outputs, tmp_path, monkeypatch):
    """A folder with what commands name: models, three texts, a task."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MODEL").symlink_to(demo.MODEL)
    disturb(demo.MODEL, tmp_path / "BASE", 0.05)
    qwen = AutoConfig.from_pretrained(models("qwen3"), vocab_size=len(AutoTokenizer.from_pretrained(demo.MODEL)))
    AutoModelForCausalLM.from_config(qwen).save_pretrained("QWEN3")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo.MODEL / name, "QWEN3")
    paragraphs = demo.EVAL_TEXT.read_text("utf-8").split("\n\n")
    half = len(paragraphs) // 2
    shutil.copy(demo.SELECT_TEXT, tmp_path / "A.txt")
    (tmp_path / "B.txt").write_text("\n\n".join(paragraphs[:half]))
    (tmp_path / "C.txt").write_text("\n\n".join(paragraphs[half : half + 4]))
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "FOLDER" / "my_task.yaml").write_text(TASK)
    (tmp_path / "tasks.json").write_text(json.dumps([{"text": "The river rises in the hills."}]))
    return tmp_path


def smaller(line):
    for large, small in SMALLER.items():
        line = line.replace(large, small)
    words = shlex.split(line)[1:]
    if words[0] in ("apply", "convert", "sensitivity") and {"--calibration", "--selection"} & set(words):
        words += FEW
    if words[0] == "heal":
        given = {word.partition("=")[0] for word in words}
        words += SHORT + [part for key in ("steps", "batch") if key not in given for part in ("--set", f"{key}=2")]
    return words


def provide(words, outputs):
    """Put there what a command reads."""
    reads = words[0] in ("verify", "eval", "report", "push") or (words[0] in ("convert", "heal") and "OUT2" in words)
    if reads and "OUT" in words and not Path("OUT").exists():
        weights = words[0] == "heal" or "--static-calibration" in words  # of full precision
        shutil.copytree(outputs / ("open" if weights else "int8"), "OUT")
    if "QWEN3" in words:  # which has a vocabulary and sizes of its own
        words[:] = [w.replace("latent_rank=48", "latent_rank=16") for w in words] + ["--set", "rope_dim=8"]


@pytest.mark.parametrize("line", [line for line in commands("reattend") if " push " not in line])
def test_it_runs(line, world, outputs, capsys, monkeypatch):
    words = smaller(line)
    provide(words, outputs)
    if "--harness" in words:  # which logs as it likes: in a process of its own
        done = subprocess.run([REATTEND, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return
    assert cli.main(args=words, prog_name="reattend", standalone_mode=False) in (None, 0)
    printed = capsys.readouterr().out
    assert printed.strip() or words[:2] == ["recipes", "copy"]
    if words[0] in ("apply", "convert", "heal"):
        assert (Path("OUT2") if "OUT2" in words else Path("OUT")).joinpath("reattend.json").is_file()


@pytest.fixture
def hub(tmp_path):
    """A Hub on this machine, empty, and the environment of who pushes to it."""
    (tmp_path / "store").mkdir()
    with writable(tmp_path / "store") as server:
        yield server, client_environment(server, tmp_path / "hf")


def printed_by(command, env):
    """What a command prints that must succeed, run as a newcomer would, in a process of its own."""
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_pushes_run(world, outputs, hub):
    server, env = hub
    shutil.copytree(outputs / "int8", "OUT")
    lines = [line for line in commands("reattend") if " push " in line]
    assert len(lines) >= 2
    for line in lines:
        printed_by([REATTEND, *shlex.split(line)[1:]], env)
    assert {"model.safetensors", "README.md"} < set(server.contents("org/name"))


def test_the_readme_leads_from_a_model_to_the_hub_and_back(world, hub):
    _, env = hub
    path = {}  # the first of the README's lines for each verb
    for line in re.findall(r"^    (reattend \w+ .+?)\s*(?:#.*)?$", PAGES[0].read_text("utf-8"), re.M):
        path.setdefault(line.split()[1], line)
    for verb in ("plan", "apply", "verify", "eval", "report", "push"):
        printed = printed_by(
            [REATTEND, *smaller(path[verb]), *(["--json"] if verb in ("eval", "verify") else [])], env
        )
        if verb == "eval":
            measured = json.loads(printed)
    assert json.loads(Path("OUT/report.json").read_text())["evaluation"]["perplexity"] == measured["perplexity"]
    here = json.loads(printed_by([sys.executable, "-P", "-c", STOCK, "OUT"], env))
    there = json.loads(printed_by([sys.executable, "-P", "-c", STOCK, "org/name"], env))
    before = json.loads(printed_by([sys.executable, "-P", "-c", STOCK, "MODEL"], env))
    assert there == here != before
    error = sum((a - b) ** 2 for a, b in zip(here, before, strict=True)) / sum(b * b for b in before)
    assert error < 0.01  # relative square error: int8 on the bundled model


@pytest.mark.parametrize("line", commands("torchrun"))
def test_lines_for_several_processes_are_commands(line):
    """That they run is tested with processes (tests/pipeline/test_several_processes.py); here their options are read."""
    words = shlex.split(line.replace(" ...", " --text A.txt --selection B.txt"))
    start = words.index("reattend")
    assert words[start - 1] == "-m"
    command = cli.commands[words[start + 1]]
    command.make_context(words[start + 1], words[start + 2 :])


def test_there_are_commands_on_every_page_that_has_blocks():
    assert len(commands("reattend")) > 30
