"""Fingerprints of texts: do two of them share text, however it is wrapped, spaced or capitalised?

A text is taken as its words in lower case, and those as all runs of 13 words (shingles). Kept are the hashes
of shingles that a modulus divides, about 5000 of a long text: a sample that two texts draw alike, so that
the shingles they share show up in both. A fingerprint is plain data, to be written into JSON.
"""

import hashlib
import re
import unicodedata
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

Fingerprint: TypeAlias = dict[str, Any]

RUN = 13  # words of a shingle: unrelated texts hardly ever share one
_SAMPLE = 5000
_SHARED = 50  # shingles in common: quotations and boilerplate have fewer
_SHARE = 0.01  # of the shorter text's: large collections repeat a paragraph here and there
_DIGITS = 12  # of a hash, in hex
_PRIME = (1 << 61) - 1
_BASE = 0x1B873593CC9E2D51 % _PRIME
_OLDEST = pow(_BASE, RUN, _PRIME)
# Scripts that write no spaces count each character as a word, or a changed line break would change the words.
_SPACELESS = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W{_SPACELESS}]+")


def fingerprint_of(content: str) -> Fingerprint:
    """Return a text's fingerprint: the number of words, the modulus, and the hashes that it divides."""
    text = unicodedata.normalize("NFKC", content).casefold()
    words = sum(1 for _ in _WORD.finditer(text))
    modulus = 1 << max((words // _SAMPLE).bit_length() - 1, 0)
    hashes = {value for value in _hashes(text, words) if value % modulus == 0}
    return {"words": words, "modulus": modulus, "hashes": "".join(f"{h:0{_DIGITS}x}" for h in sorted(hashes))}


def _hashes(text: str, words: int) -> Iterator[int]:
    """Yield the hash of every run of words; a text that is shorter than a run is one run."""
    known: dict[str, int] = {}
    run: deque[int] = deque()
    rolled = 0
    for match in _WORD.finditer(text):
        word = match[0]
        value = known.get(word)
        if value is None:
            value = known[word] = int.from_bytes(hashlib.sha256(word.encode("utf-8", "replace")).digest()[:7], "big")
        run.append(value)
        rolled = rolled * _BASE + value
        if len(run) > RUN:
            rolled -= run.popleft() * _OLDEST
        rolled %= _PRIME
        if len(run) == min(RUN, words):
            yield rolled % 16**_DIGITS
    if not words:
        yield 0


def overlap(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Tell by their fingerprints whether two texts share text: 50 shingles and a hundredth of the shorter one's,
    or all of the shorter one's where it has fewer.

    Texts of fewer than 13 words share text where their words are the same. Raises `ValueError` for what is
    no fingerprint.
    """
    (some, modulus, short), (others, other_modulus, other_short) = _parsed(a), _parsed(b)
    if short != other_short:
        return False
    modulus = max(modulus, other_modulus)
    mine, theirs = ({h for h in hashes if h % modulus == 0} for hashes in (some, others))
    shared, shorter = len(mine & theirs) * modulus, min(len(mine), len(theirs)) * modulus
    return shared > 0 and shared >= min(shorter, max(_SHARED, _SHARE * shorter))


def _parsed(data: Mapping[str, Any]) -> tuple[set[int], int, int]:
    """Return the hashes, the modulus, and the number of words where that is less than a shingle."""
    try:
        text, modulus, words = data["hashes"], int(data["modulus"]), int(data["words"])
        hashes = {int(text[i : i + _DIGITS], 16) for i in range(0, len(text), _DIGITS)}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError("not a fingerprint of a text") from error
    if modulus < 1:
        raise ValueError("not a fingerprint of a text")
    return hashes, modulus, words if words < RUN else 0
