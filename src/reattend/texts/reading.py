"""Read a text from a file or a dataset, and hold texts of different purposes apart."""

import hashlib
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from reattend.errors import Failure, Refusal, first_line
from reattend.texts.shingles import Fingerprint, fingerprint_of, overlap

DATASET = "dataset:"
_DATASET_KEYS = {"name": "", "split": "train", "column": "text"}


@dataclass(frozen=True)
class Text:
    """A text in memory and where it came from."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """Hash of the UTF-8 bytes."""
        return hashlib.sha256(self.content.encode()).hexdigest()

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """What tells whether another text shares content with this one: see `overlap`."""
        return fingerprint_of(self.content)


def read_text(source: str | os.PathLike[str]) -> Text:
    """Read a UTF-8 file, or `dataset:PATH?name=..&split=train&column=text` through `datasets`.

    Rows of a dataset are joined by blank lines. Raises `Refusal` for what can't be read as text.
    """
    name = os.fspath(source)
    if not name:
        raise Refusal("the name of a text is empty: expected a file, or dataset:PATH")
    content = _read_dataset(name) if name.startswith(DATASET) else _read_file(Path(source))
    return Text(name, content)


def _read_file(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise Refusal(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise Refusal(f"{path}: not UTF-8 text") from error


def _read_dataset(name: str) -> str:
    path, options = _dataset_options(name)
    try:
        import datasets
    except ImportError as error:
        raise Refusal(f"{name}: datasets is not installed: pip install datasets") from error
    try:
        rows = datasets.load_dataset(path, options["name"] or None, split=options["split"])
    except Exception as error:  # loading scripts, parsers and the network raise anything
        kind = Refusal if _is_mistake(error) else Failure
        raise kind(f"{name}: datasets can't read it: {_reason(error)}") from error
    return _column(name, rows, options["column"])


def _dataset_options(name: str) -> tuple[str, dict[str, str]]:
    expected = f"expected {DATASET}PATH?name=CONFIG&split=train&column=text"
    path, asks, query = name.removeprefix(DATASET).partition("?")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if asks else []
    except ValueError as error:
        raise Refusal(f"{name}: {query!r} can't be read; {expected}") from error
    for key, times in Counter(key for key, _ in pairs).items():
        if key not in _DATASET_KEYS:
            raise Refusal(f"{name}: unknown {key!r}; {expected}")
        if times > 1:
            raise Refusal(f"{name}: {key!r} is given {times} times; {expected}")
    for key, value in pairs:
        if not value and key != "name":
            raise Refusal(f"{name}: {key!r} is empty; {expected}")
    if not path:
        raise Refusal(f"{name}: names no dataset; {expected}")
    return path, _DATASET_KEYS | dict(pairs)


def _is_mistake(error: Exception) -> bool:
    """Tell what the user can mend (a path, a configuration, a split) from what went wrong elsewhere."""
    return isinstance(error, FileNotFoundError) or str(error).startswith(("Unknown split", "BuilderConfig"))


def _reason(error: Exception) -> str:
    """Return a message, with the cause's: datasets' own may be that an error occurred."""
    cause = error.__cause__
    return f"{first_line(error)}: {first_line(cause)}" if isinstance(cause, Exception) else first_line(error)


def _column(name: str, rows: Any, column: str) -> str:
    names = getattr(rows, "column_names", None) or []
    if column not in names:
        raise Refusal(f"{name}: has no column {column!r}; its columns are {', '.join(map(str, names))}")
    try:
        return "\n\n".join(rows[column])
    except TypeError as error:
        raise Refusal(f"{name}: column {column!r} does not hold text in every row") from error


def check_separate(texts: Mapping[str, Text]) -> None:
    """Refuse texts of different purposes that share text, however it is wrapped, spaced or capitalised."""
    seen: dict[str, Fingerprint] = {}
    for purpose, text in texts.items():
        for other, known in seen.items():
            if overlap(text.fingerprint, known):
                raise Refusal(f"{text.name}: shares text with the {other} text, and must be another one")
        seen[purpose] = text.fingerprint
