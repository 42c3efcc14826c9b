import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import reattend
from reattend import demo
from reattend.errors import Failure, Refusal


def reference(windows):
    """Perplexity by transformers' own loss, one window at a time."""
    model = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(demo.MODEL)(demo.EVAL_TEXT.read_text("utf-8")).input_ids
    cut = [torch.tensor([ids[i * 256 : (i + 1) * 256]]) for i in range(windows)]
    with torch.inference_mode():
        return torch.tensor([float(model(c, labels=c).loss) for c in cut]), ids


def test_perplexity_equals_transformers_loss():
    losses, ids = reference(6)
    report = reattend.evaluate(demo.MODEL, demo.EVAL_TEXT, window=256, windows=6, dtype="float32")
    assert report["perplexity"] == pytest.approx(float(losses.mean().exp()), rel=1e-5)
    assert report["perplexity_stderr"] == pytest.approx(float(losses.mean().exp() * losses.std() / 6**0.5), rel=1e-3)
    assert report["tokens"] == 6 * 255
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    nbytes = sum(len(tokenizer.decode(ids[i * 256 + 1 : (i + 1) * 256]).encode()) for i in range(6))
    assert report["bits_per_byte"] == pytest.approx(float(losses.mean()) * 6 * 255 / math.log(2) / nbytes, rel=2e-3)


def test_a_model_against_itself_and_one_window():
    report = reattend.evaluate(demo.MODEL, demo.EVAL_TEXT, against=demo.MODEL, window=64, windows=1, dtype="float32")
    assert report["delta"] == 0
    assert report["kl_mean"] == pytest.approx(0, abs=1e-7)
    assert report["top1_agreement"] == 1
    assert report["perplexity_stderr"] is None


def test_refusals(models, tmp_path):
    (tmp_path / "short.txt").write_text("few words")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfd" * 400)
    for arguments in (
        {"model": models("bert"), "text": demo.EVAL_TEXT},
        {"model": models("llama"), "text": demo.EVAL_TEXT, "window": 64},
        {"model": demo.MODEL, "text": tmp_path / "short.txt", "window": 256},
        {"model": demo.MODEL, "text": tmp_path / "latin.txt", "window": 256},
        {"model": demo.MODEL, "text": tmp_path / "absent.txt", "window": 256},
        {"model": demo.MODEL, "text": demo.EVAL_TEXT, "window": 100_000},
        {"model": demo.MODEL, "text": demo.EVAL_TEXT, "window": 1},
        {"model": demo.MODEL, "text": demo.EVAL_TEXT, "window": 256, "dtype": "int3"},
    ):
        with pytest.raises(Refusal):
            reattend.evaluate(**arguments)


def test_another_tokenizer_is_refused(tmp_path):
    other = shutil.copytree(demo.MODEL, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text("utf-8"))
    content["model"]["merges"] = content["model"]["merges"][:50]
    (other / "tokenizer.json").write_text(json.dumps(content))
    changed = AutoTokenizer.from_pretrained(other)("the cat and the hat").input_ids
    assert changed != AutoTokenizer.from_pretrained(demo.MODEL)("the cat and the hat").input_ids
    with pytest.raises(Refusal, match="different tokens"):
        reattend.evaluate(other, demo.EVAL_TEXT, against=demo.MODEL, window=64, windows=1)


def test_a_broken_tokenizer_is_a_failure_that_names_the_model(tmp_path):
    other = shutil.copytree(demo.MODEL, tmp_path / "other")
    (other / "tokenizer.json").write_text("{")
    with pytest.raises(Failure, match="other: its tokenizer"):
        reattend.evaluate(other, demo.EVAL_TEXT, window=64, windows=1)
