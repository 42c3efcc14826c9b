"""A number from a text that shaped the model flatters it: such a text is refused."""

import os
from typing import Any

from reattend.checkpoint.files import LocalFolder, open_files
from reattend.checkpoint.index import MANIFEST, read_json
from reattend.errors import Refusal
from reattend.texts.reading import Text
from reattend.texts.shingles import overlap


def check_unused(text: Text, model: str | os.PathLike[str]) -> None:
    """Refuse a text that shares content with one by which `model`, a folder or a Hub id, was made."""
    files = open_files(model)
    if isinstance(files, LocalFolder) and (files.path / MANIFEST).is_dir():
        raise Refusal(f"{files.name}/{MANIFEST}: is a folder, expected a file")
    sizes = files.sizes()
    if MANIFEST not in sizes:
        return
    used = read_json(files, sizes, MANIFEST).get("texts", {})
    try:
        shared = [purpose for purpose, record in used.items() if _shares(text, record)]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Refusal(f"{files.name}/{MANIFEST}: is damaged") from error
    if shared:
        raise Refusal(f"{text.name}: shares text with the {shared[0]} text of {model}; measure on another text")


def _shares(text: Text, record: Any) -> bool:
    """Compare with a record: the hash alone, as older outputs have it, or the hash and a fingerprint."""
    if isinstance(record, str):
        return record == text.sha256
    return bool(record["sha256"] == text.sha256) or overlap(record["shingles"], text.fingerprint)
