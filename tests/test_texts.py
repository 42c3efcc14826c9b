"""Texts: what is read, and what counts as sharing text."""

import json
import random
import sys
import textwrap
import types

import pytest

from reattend import demo
from reattend.errors import Failure, Refusal
from reattend.texts.reading import Text, check_separate, read_text
from reattend.texts.shingles import fingerprint_of, overlap

EVAL = demo.EVAL_TEXT.read_text("utf-8")
SELECT = demo.SELECT_TEXT.read_text("utf-8")


def drawn(words, seed):
    """A long text of its own: words of the demo's texts in a random order."""
    vocabulary = sorted(set((EVAL + SELECT).split()))
    return " ".join(random.Random(seed).choices(vocabulary, k=words))


LONG = drawn(200_000, 1)
SAME = {
    "itself": (EVAL, EVAL),
    "wrapped anew": (EVAL, textwrap.fill(EVAL, 50)),
    "a mark, capitals and spaces": (EVAL, "\ufeff" + EVAL.upper().replace(" ", "  ")),
    "a piece": (EVAL, "Other words first. " + EVAL[3000:9000]),
    "a piece of a long one": (LONG, LONG[500_000:520_000]),
    "a piece within a long one": (LONG, drawn(150_000, 2) + LONG[300_000:340_000]),
    "the longer is first": (LONG[:30_000], LONG),
    "few words": ("The cat sat.", "the CAT  sat"),
    "a paragraph": (EVAL[:200], EVAL[:200] + "\n"),
    "a paragraph of it": (EVAL[:200], EVAL),
    "no spaces": ("\u6cb3\u5ddd" * 30, ("\u6cb3\u5ddd" * 30)[:31] + "\n" + ("\u6cb3\u5ddd" * 30)[31:]),
    "nothing": ("", " ... "),
}
OTHER = {
    "other articles": (EVAL, SELECT),
    "long ones": (LONG, drawn(200_000, 3)),
    "a quotation": (EVAL, SELECT + EVAL[:200]),
    "few words": ("The cat sat.", "The cat stood."),
    "few words of many": ("The cat sat.", "The cat sat. " * 9),
    "nothing": ("", EVAL),
}


@pytest.mark.parametrize(("a", "b"), SAME.values(), ids=SAME)
def test_shared_text_is_found(a, b):
    with pytest.raises(Refusal, match="b: shares text with the calibration text"):
        check_separate({"calibration": Text("a", a), "selection": Text("b", b)})


@pytest.mark.parametrize(("a", "b"), OTHER.values(), ids=OTHER)
def test_other_texts_are_let_through(a, b):
    check_separate({"calibration": Text("a", a), "selection": Text("b", b)})


def test_a_fingerprint_is_small_plain_data_that_stays_the_same():
    small, large = Text("", EVAL).fingerprint, Text("", LONG).fingerprint
    assert json.loads(json.dumps(large)) == large
    assert len(large["hashes"]) < 130_000
    assert Text("", "one two three").fingerprint == {"words": 3, "modulus": 1, "hashes": "1f2084b07756"}
    assert not overlap(small, large)
    for bad in ({}, {"words": 1, "modulus": 0, "hashes": ""}, {"words": 1, "modulus": 1, "hashes": "xyz"}, [], 3):
        with pytest.raises(ValueError, match="fingerprint"):
            overlap(small, bad)


def test_a_mark_of_the_encoding_is_no_text(tmp_path):
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbfwords")
    assert read_text(tmp_path / "text").content == "words"
    with pytest.raises(Refusal, match="empty"):
        read_text("")


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("", "names no dataset"),
        ("x?split", "can't be read"),
        ("x?splt=train", "unknown 'splt'"),
        ("x?split=a&split=b", "'split' is given 2 times"),
        ("x?column=", "'column' is empty"),
    ],
)
def test_a_query_that_is_not_understood_is_refused(query, words):
    with pytest.raises(Refusal, match=words) as caught:
        read_text(f"dataset:{query}")
    assert "dataset:PATH?name=CONFIG" in str(caught.value)


def generic():
    error = RuntimeError("An error occurred while generating the dataset")
    error.__cause__ = ValueError("row 7 is no JSON")
    return error


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (FileNotFoundError("no such folder"), Refusal, "no such folder"),
        (ValueError('Unknown split "tst". Should be one of [...]'), Refusal, "Unknown split"),
        (generic(), Failure, "generating the dataset: row 7 is no JSON"),
    ],
)
def test_errors_of_datasets_are_told_with_their_cause(monkeypatch, error, kind, words):
    def load_dataset(*arguments, **options):
        raise error

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(kind, match=words):
        read_text("dataset:x")


def test_columns_that_hold_no_text_are_refused(monkeypatch):
    class Rows(dict):
        column_names = ("text", "number")

    rows = Rows(text=["a", None], number=[1, 2])
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *a, **k: rows))
    for query, words in (("x", "'text' does not hold text"), ("x?column=passage", "columns are text, number")):
        with pytest.raises(Refusal, match=words):
            read_text(f"dataset:{query}")


def test_a_paragraph_that_two_collections_repeat_is_let_through_and_more_is_not():
    def words(start, count):
        return " ".join(f"w{i}" for i in range(start, start + count))

    one, other = words(0, 20_000), words(100_000, 20_000)
    assert not overlap(fingerprint_of(one + " " + words(50_000, 90)), fingerprint_of(words(50_000, 90) + " " + other))
    assert overlap(fingerprint_of(one + " " + words(50_000, 900)), fingerprint_of(words(50_000, 900) + " " + other))
    assert overlap(fingerprint_of(one), fingerprint_of(words(3_000, 200)))
