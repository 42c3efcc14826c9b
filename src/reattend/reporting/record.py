"""report.json: what was measured of an output, and of which bytes."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, TypeAlias

from reattend.checkpoint.files import LocalFolder
from reattend.checkpoint.index import MANIFEST, REPORT, is_reported, open_checkpoint
from reattend.errors import Refusal

Hashes: TypeAlias = dict[str, dict[str, Any]]  # path -> sha256, bytes
_BLOCK = 1 << 20


def output_folder(out: str | os.PathLike[str]) -> Path:
    """Return the folder of an output. Raises `Refusal` for what is none, or holds no sound checkpoint."""
    folder = Path(out)
    if not folder.is_dir():
        raise Refusal(f"{out}: not a folder; expected an output of reattend apply")
    if not (folder / MANIFEST).is_file():
        raise Refusal(f"{out}: has no {MANIFEST}, so it is no finished output of reattend apply")
    open_checkpoint(folder)
    return folder


def read_report(folder: Path) -> dict[str, Any] | None:
    """Return an output's report, None where it has none. Raises `Refusal` for a file that is damaged."""
    path = folder / REPORT
    if not path.exists():
        return None
    try:
        report = json.loads(path.read_text("utf-8"))
        report["verification"]["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refusal(f"{path}: is damaged; remove it, and run reattend report again") from error
    checked: dict[str, Any] = report
    return checked


def hash_files(folder: Path, *, reported: bool = False) -> Hashes:
    """Return the sha256 and bytes of every file that is part of an output, or of those that `report` wrote.

    Raises `Refusal` for what is no file, as nothing can be said of what it leads to.
    """
    files = LocalFolder(folder)
    for name, kind in files.skipped().items():
        raise Refusal(f"{folder / name}: is {kind}, expected files alone")
    sizes = files.sizes()
    return {
        name: {"sha256": sha256_of(folder / name), "bytes": size}
        for name, size in sizes.items()
        if is_reported(name) is reported
    }


def sha256_of(path: Path) -> str:
    """Return a file's sha256, read block by block."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise Refusal(f"{path}: {error.strerror or error}") from error
    return digest.hexdigest()


def verified_files(out: str | os.PathLike[str]) -> dict[str, str]:
    """Return path -> sha256 of every file of a verified output, those of its report included.

    Raises `Refusal`, saying what to run, for an output without a report, one that was found unsound or never
    compared with its source, and for files that were changed, added or lost since.
    """
    folder = output_folder(out)
    report = read_report(folder)
    again = f"run reattend report {out} --against MODEL"
    if report is None:
        raise Refusal(f"{out}: has no {REPORT}, so nothing says that it was verified; {again}")
    verification = report["verification"]
    if verification["problems"]:
        raise Refusal(f"{out}: verification found {verification['problems'][0]!r}; see {REPORT}")
    if verification.get("logits_error") is None:
        raise Refusal(f"{out}: its logits were never compared with its source's; {again}")
    now, then = hash_files(folder), verification["files"]
    for name in sorted({*now, *then}):
        if now.get(name) != then.get(name):
            what = "is gone" if name not in now else "is new" if name not in then else "was changed"
            raise Refusal(f"{folder / name}: {what} since the output was verified; {again}")
    return {name: entry["sha256"] for name, entry in (now | hash_files(folder, reported=True)).items()}
