import json
import os
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import reattend
from pairs import QUICK, TEXTS, heal, tiny
from reattend import demo
from reattend.cli import main
from reattend.errors import Refusal
from reattend.recipes.schema import parse_recipe

SETTINGS = {
    ("learning_rates",): (1, "unknown 'learning_rates'; nearest is 'learning_rate'"),
    ("kl",): (-1.0, "kl: .*greater than or equal to 0"),
    ("steps",): (0, "steps: .*greater than or equal to 1"),
    ("precision",): ("fp16", "precision: .*'float32' or 'bf16'"),
    ("kl", "labels"): (0.0, "kl, hidden, labels and outliers are all 0"),
    ("new_steps",): (2, "new_steps and new_learning_rate do nothing without new"),
    ("new",): (["*.gate.*"], r"heal: '\*.gate.\*' \(train, new\) matches no tensor that is trained"),
    ("train",): (["model.layers.7.*"], r"heal: 'model.layers.7.\*' \(train, new\) matches no tensor"),
    ("windows",): (10_000, r"eval.txt: holds \d+ windows of 32 tokens, 10000 are asked for"),
    ("window",): (4096, "window: 4096 tokens, the model takes 128"),
    ("selection_windows",): (10_000, r"select.txt: holds \d+ windows of 32 tokens, 10000 are asked for"),
}


@pytest.mark.parametrize(("keys", "value", "message"), [(k, *v) for k, v in SETTINGS.items()])
def test_settings(student, teacher, tmp_path, keys, value, message):
    with pytest.raises(Refusal, match=message):
        heal(student, tmp_path / "out", teacher, **dict.fromkeys(keys, value))
    assert not any(tmp_path.iterdir())


def test_settings_that_do_not_go_together(student, teacher, tmp_path):
    with pytest.raises(Refusal, match="new_steps: 9 are more than the 6 steps in all"):
        heal(student, tmp_path / "out", teacher, new=["*.mlp.*"], new_steps=9)
    with pytest.raises(Refusal, match="teacher does nothing without kl or hidden"):
        heal(student, tmp_path / "out", teacher, kl=0.0, labels=1.0)
    for own in (None, student):
        with pytest.raises(Refusal, match=r"the model would be its own teacher, with nothing to learn: name one"):
            heal(student, tmp_path / "out", own)
    assert not any(tmp_path.iterdir())


def test_teachers(student, tmp_path):
    with pytest.raises(Refusal, match="no/such/model: not a folder"):
        heal(student, tmp_path / "out", "no/such/model")
    other = tiny(tmp_path / "other", vocab_size=2049)
    with pytest.raises(Refusal, match=r"heal: teacher: .*other has 2049 tokens, the model has 2048"):
        heal(student, tmp_path / "out", other)
    deep = tiny(tmp_path / "deep", num_hidden_layers=3)
    with pytest.raises(Refusal, match=r"heal: hidden: .*deep has 3 layers of 32, the model 2 of 32"):
        heal(student, tmp_path / "out", deep, hidden=1.0)
    heal(student, tmp_path / "out", deep, steps=1)  # logits alone go together
    tokenizer = json.loads((deep / "tokenizer.json").read_text("utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (deep / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    with pytest.raises(Refusal, match=r"heal: teacher: .*deep has another vocabulary than .*student"):
        heal(student, tmp_path / "again", deep, steps=1)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (deep / file).unlink()
    with pytest.raises(Refusal, match=r"deep: has no tokenizer that says whether its tokens are those of the model"):
        heal(student, tmp_path / "again", deep, steps=1)


def test_texts(student, teacher, tmp_path):
    with pytest.raises(Refusal, match=r"shares text with the calibration text, and must be another one"):
        heal(student, tmp_path / "out", teacher, selection=TEXTS["text"])
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(Refusal, match=r"short.txt: \d+ tokens are fewer than one window of 32"):
        heal(student, tmp_path / "out", teacher, text=short)
    short.unlink()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["bert", "mixtral"])
def test_families_that_cannot_be_trained(models, family):
    expected = {"bert": "bert is an encoder", "mixtral": "mixtral is not supported: transformers stacks its experts"}
    with pytest.raises(Refusal, match=expected[family]):
        reattend.plan("heal", models(family))


def test_quantised_models_are_refused(sound):
    with pytest.raises(
        Refusal, match="quantization_config: quantised codes can't be trained; heal before quantising"
    ):
        reattend.plan("heal", sound)


def test_other_dtypes_are_refused(student, tmp_path):
    double = tiny(tmp_path / "double")
    tensors = load_file(double / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].double()
    save_file(tensors, double / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        Refusal, match=r"tensor 'model.layers.0.mlp.up_proj.weight' is F64; F32, F16, BF16 can be trained"
    ):
        reattend.plan("heal", double)


def test_too_little_memory(student, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("reattend.healing.models.free_bytes", lambda device: 1_000_000)
    with pytest.raises(Refusal, match=r"heal: training needs \d+ bytes on cpu and activations, 1000000 are free"):
        heal(student, tmp_path / "out", teacher)
    assert not any(tmp_path.iterdir())


def test_plan_says_what_it_takes(student):
    recipe = parse_recipe({"window": 32, "steps": [{"step": "heal"}]}, "test")
    summary = reattend.plan(recipe, student).summary()
    numbers = sum(tensor.numel() for tensor in load_file(student / "model.safetensors").values())
    # fp32 weights, gradients and two moments; a copy of them at evaluation; a teacher in fp32.
    assert summary["calibration_memory_at_least_bytes"]["weights_held"] == 400_000_000 + numbers * (16 + 4 + 4)
    assert summary["steps"][0]["tensors_rewritten"] == len(load_file(student / "model.safetensors"))
    assert summary["disk_bytes"] > numbers * (2 + 2 * 12 + 3 * 2)
    assert f"{numbers} numbers are trained" in summary["remarks"][0]


def call(monkeypatch, capsys, *arguments):
    environment = dict(os.environ)
    monkeypatch.setattr(sys, "argv", ["reattend", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught, warnings.catch_warnings():
        main()
    os.environ.clear()
    os.environ.update(environment)
    return caught.value.code, *capsys.readouterr()


def test_command_line(student, teacher, tmp_path, monkeypatch, capsys):
    given = ["heal", student, tmp_path / "out", "--text", demo.EVAL_TEXT, "--selection", demo.SELECT_TEXT]
    settings = [f"--set={key}={value}" for key, value in QUICK.items()]
    code, out, err = call(monkeypatch, capsys, *given[:3], "--selection", demo.SELECT_TEXT)
    assert (code, out) == (2, "")
    assert err == "reattend: error: Missing option '--text'. (see reattend heal --help)\n"
    code, out, err = call(monkeypatch, capsys, *given, *settings)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("reattend: error: heal: the model would be its own teacher")
    code, out, err = call(monkeypatch, capsys, *given, "--teacher", teacher, *settings)
    assert code == 0, err
    assert "kept_step" in out
    told = [line for line in err.splitlines() if line.startswith("healing: ")]
    assert told[-1].startswith("healing: 768 of 768 tokens, ")
    assert "tokens/s, loss " in told[-1]
    assert ", selection " in told[-1]


def test_gradients_leave_no_trace(student, teacher, tmp_path):
    """What a run switches on is off after it, also after one that failed."""
    with pytest.raises(Refusal):
        heal(student, tmp_path / "out", teacher, learning_rate=1e30, clip_norm=None, warmup=0)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
