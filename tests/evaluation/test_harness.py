"""lm-evaluation-harness on local tasks, against sums of log probabilities that stock transformers gives."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from reattend import Refusal, demo
from reattend.evaluation.harness import evaluate_tasks

REATTEND = Path(sys.executable).with_name("reattend")
QUESTIONS = [
    {"question": "The river rises in the", "choices": [" hills", " xq"], "answer": 0},
    {"question": "In 1874 a bridge was", "choices": [" built", " zz"], "answer": 1},
    {"question": "The town lies on the", "choices": [" qk", " river"], "answer": 1},
]
TEXT = "The river rises in the hills north of the town and runs to the sea."
TASKS = {
    "local_choice": """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.json}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 2.0}
""",
    "local_rolling": """
task: local_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/text.json}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "choice.json").write_text(json.dumps(QUESTIONS))
    (tmp_path / "text.json").write_text(json.dumps([{"text": TEXT}]))
    for name, task in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(task.replace("FOLDER", str(tmp_path)))
    return tmp_path


def log_likelihood(model, tokenizer, context, text):
    """The sum of log probabilities of a text after a context, given as token ids."""
    ids = torch.tensor([[*context, *tokenizer(text).input_ids]])
    with torch.no_grad():
        scores = model(ids).logits[0, :-1].double().log_softmax(-1)
    return float(scores[len(context) - 1 :].gather(1, ids[0, len(context) :, None]).sum())


def test_numbers_are_those_of_the_models_own_probabilities(folder, tmp_path):
    command = [REATTEND, "eval", demo.MODEL, "--harness", "local_choice, local_rolling", "--harness-tasks", folder]
    command += ["--dtype", "float32", "--batch-size", "2", "--json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    tasks = json.loads(done.stdout)["tasks"]
    model = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    right = 0
    for asked in QUESTIONS:
        context = tokenizer(asked["question"]).input_ids
        scores = [log_likelihood(model, tokenizer, context, choice) for choice in asked["choices"]]
        right += scores.index(max(scores)) == asked["answer"]
    assert tasks["local_choice"]["acc"] == pytest.approx(right / len(QUESTIONS))
    assert 0 < right < len(QUESTIONS)  # both a hit and a miss
    assert (tasks["local_choice"]["version"], tasks["local_choice"]["documents"]) == (2.0, 3)
    bits = -log_likelihood(model, tokenizer, [tokenizer.eos_token_id], TEXT) / math.log(2) / len(TEXT.encode())
    assert tasks["local_rolling"]["bits_per_byte"] == pytest.approx(bits, rel=1e-4)


def test_an_unknown_task_is_named_with_those_near(folder):
    with pytest.raises(Refusal, match="no task 'local_choise'; near are local_choice, "):
        evaluate_tasks(demo.MODEL, ["local_choise"], tasks_folder=folder)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tasks_folder": "absent"}, "absent: no such folder of tasks"),
        ({"limit": 0}, "limit: 0"),
        ({"dtype": "int9"}, "int9"),
        ({"device": "cuda:9"}, "cuda:9"),
    ],
)
def test_refusals(options, says):
    with pytest.raises(Refusal, match=says):
        evaluate_tasks(demo.MODEL, ["x"], **options)


def test_an_encoder_is_refused(models):
    with pytest.raises(Refusal, match="bert is an encoder"):
        evaluate_tasks(models("bert"), ["x"])


def test_without_lm_eval_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(Refusal, match=r"pip install 'reattend\[eval\]'"):
        evaluate_tasks(demo.MODEL, ["x"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "expects --text FILE, or --harness TASKS"),
        (["--text", "a", "--harness", "b"], "expects --text FILE, or --harness TASKS"),
        (["--harness", "x", "--windows", "2"], "--windows: goes with --text alone"),
        (["--text", "a", "--limit", "2"], "--limit: goes with --harness alone"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, says):
    done = subprocess.run([REATTEND, "eval", demo.MODEL, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"reattend: error: {'eval: ' if 'expects' in says else ''}{says}\n"
