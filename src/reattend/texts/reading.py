"""Read a text from a file or a dataset, and hold texts of different purposes apart."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl

from reattend.errors import Failure, Refusal, first_line

DATASET = "dataset:"
_LONG_LINE = 200  # characters; shorter lines (headings, list items) recur between unrelated texts
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


def read_text(source: str | os.PathLike[str]) -> Text:
    """Read a UTF-8 file, or `dataset:PATH?name=..&split=train&column=text` through `datasets`.

    Rows of a dataset are joined by blank lines. Raises `Refusal` for what can't be read as text.
    """
    name = os.fspath(source)
    content = _read_dataset(name) if name.startswith(DATASET) else _read_file(Path(source))
    return Text(name, content)


def _read_file(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise Refusal(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise Refusal(f"{path}: not UTF-8 text") from error


def _read_dataset(name: str) -> str:
    path, _, query = name.removeprefix(DATASET).partition("?")
    options = _DATASET_KEYS | dict(parse_qsl(query))
    if not path or set(options) != set(_DATASET_KEYS):
        raise Refusal(f"{name}: expected {DATASET}PATH?name=CONFIG&split=train&column=text")
    try:
        import datasets
    except ImportError as error:
        raise Refusal(f"{name}: datasets is not installed: pip install datasets") from error
    try:
        rows = datasets.load_dataset(path, options["name"] or None, split=options["split"])
        values = rows[options["column"]]
        return "\n\n".join(values)
    except Exception as error:  # loading scripts, parsers and the network raise anything
        raise Failure(f"{name}: datasets can't read it: {first_line(error)}") from error


def check_separate(texts: Mapping[str, Text]) -> None:
    """Refuse texts of different purposes that share a line of 200 characters or more, or are the same."""
    seen: dict[str, str] = {}
    for purpose, text in texts.items():
        lines = {line for line in text.content.splitlines() if len(line) >= _LONG_LINE} | {text.content}
        for line in lines:
            if line in seen:
                raise Refusal(f"{text.name}: shares text with the {seen[line]} text, and must be another one")
        seen |= dict.fromkeys(lines, purpose)
