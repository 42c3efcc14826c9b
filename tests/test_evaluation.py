import json
import math
import shutil
import types

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import reattend
from reattend import demo
from reattend.errors import Failure, Refusal
from reattend.evaluation import perplexity
from reattend.modeling import loading
from reattend.texts.reading import read_text


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


def never(*arguments, **options):
    raise AssertionError("the model is loaded")


@pytest.mark.parametrize("content", ["", " ", "few words"])
def test_a_text_that_is_too_short_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch, content):
    monkeypatch.setattr(perplexity, "load", never)
    (tmp_path / "text").write_text(content)
    with pytest.raises(Refusal, match="fewer than one window"):
        reattend.evaluate(demo.MODEL, tmp_path / "text", window=64)
    with pytest.raises(Refusal, match="windows: 0"):
        reattend.evaluate(demo.MODEL, demo.EVAL_TEXT, window=64, windows=0)


def recorded(folder, texts):
    folder.mkdir()
    for file in demo.MODEL.iterdir():
        (folder / file.name).symlink_to(file)
    record = texts if isinstance(texts, str) else json.dumps({"texts": texts})
    (folder / "reattend.json").write_text(record)
    return folder


def test_a_text_that_shares_content_with_those_of_the_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(perplexity, "load", never)
    used = read_text(demo.EVAL_TEXT)
    (tmp_path / "piece.txt").write_text(used.content[2000:9000].upper(), "utf-8")
    new = recorded(tmp_path / "new", {"calibration": {"sha256": used.sha256, "shingles": used.fingerprint}})
    old = recorded(tmp_path / "old", {"selection": used.sha256})
    for model, text, purpose in (
        (new, tmp_path / "piece.txt", "calibration"),
        (new, demo.EVAL_TEXT, "calibration"),
        (old, demo.EVAL_TEXT, "selection"),
    ):
        with pytest.raises(Refusal, match=f"shares text with the {purpose} text"):
            reattend.evaluate(model, text, window=64)
    with pytest.raises(AssertionError, match="is loaded"):
        reattend.evaluate(new, demo.SELECT_TEXT, window=64)


@pytest.mark.parametrize(
    "record",
    ["{", "[]", "[" * 100_000, '{"texts": [1]}', '{"texts": {"calibration": 3}}', '{"texts": {"calibration": {}}}',
     '{"texts": {"calibration": {"sha256": "", "shingles": {"words": 1}}}}', None],
)  # fmt: skip
def test_a_damaged_record_is_refused_by_name(tmp_path, record):
    folder = recorded(tmp_path / "out", record or "")
    if record is None:
        (folder / "reattend.json").unlink()
        (folder / "reattend.json").mkdir()
    with pytest.raises(Refusal, match=r"out/reattend\.json: ") as caught:
        reattend.evaluate(folder, demo.EVAL_TEXT, window=64)
    assert "\n" not in str(caught.value)


def fake(monkeypatch, answer):
    class Model:
        device, dtype = torch.device("cpu"), torch.float32

        def __call__(self, tokens):
            return answer(tokens)

    monkeypatch.setattr(perplexity, "load", lambda *a, **k: loading.Loaded(Model(), None))


def logits(value):
    def answer(tokens):
        content = torch.zeros(*tokens.shape, 2048)
        content[..., 0] = value
        return types.SimpleNamespace(logits=content)

    return answer


def unknown_token(tokens):
    raise IndexError("index out of range in self")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (logits(math.nan), "logits hold NaN or inf"),
        (logits(math.inf), "logits hold NaN or inf"),
        (logits(1e6), "too much for a perplexity"),
        (lambda tokens: types.SimpleNamespace(last_hidden_state=tokens), "gives no logits"),
        (unknown_token, "IndexError: index out of range"),
    ],
)
def test_what_is_no_number_is_a_failure(monkeypatch, answer, words):
    fake(monkeypatch, answer)
    with pytest.raises(Failure, match=words) as caught:
        reattend.evaluate(demo.MODEL, demo.EVAL_TEXT, window=64, windows=2)
    assert str(demo.MODEL) in str(caught.value)
