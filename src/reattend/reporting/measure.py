"""report(): verify an output, measure it against its source, and leave what was found beside its weights."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reattend
from reattend import processes
from reattend.checkpoint.files import LocalFolder, open_files
from reattend.checkpoint.index import CARD, MANIFEST, PLOTS, REPORT, REPORT_TEXT, SOURCE_CARD
from reattend.errors import Refusal
from reattend.evaluation.perplexity import evaluate
from reattend.pipeline.inspection import inspect
from reattend.pipeline.verification import check_source, verify
from reattend.progress import Progress, silent
from reattend.reporting.card import check_name, source_metadata, write_card
from reattend.reporting.commands import commands, variables
from reattend.reporting.document import document
from reattend.reporting.plots import plots
from reattend.reporting.record import hash_files, output_folder, read_report, sha256_of
from reattend.texts.reading import DATASET

_SIZES = ("bytes", "parameters", "cache_bytes_per_token")


@dataclass(frozen=True)
class Measured:
    """How perplexity is measured: see `evaluate`. None of it where `text` is None."""

    text: str | os.PathLike[str] | None = None
    window: int = 2048
    windows: int | None = None
    dtype: str = "auto"
    outliers: bool = False
    device: str = "cpu"

    def options(self) -> dict[str, Any]:
        """Return what `evaluate` takes besides the texts."""
        names = ("window", "windows", "dtype", "outliers", "device")
        return {name: getattr(self, name) for name in names}


def report(
    out: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str] | None = None,
    base: str | None = None,
    repository: str | None = None,
    progress: Progress = silent,
    **measured: Any,
) -> dict[str, Any]:
    """Verify `out`, measure it on a `text`, and write report.json, REPORT.md, plots and the card README.md into it.

    `against` is its source (a folder or a Hub id): without it nothing is compared. `base` names the base model on
    the Hub (org/name) where `out` was made from a folder, `repository` the one that `out` will be pushed to: the card
    loads the model by that name, else by the folder's. `measured` takes `text`, `window`, `windows`, `dtype`,
    `outliers` and `device` as `evaluate` does. What an earlier report measured on the same bytes is kept where it is
    not measured again. The source's card becomes SOURCE_README.md; a card that was edited is left alone. Returns the
    report. Raises `Refusal` where `out` is no output or `against` not its source, and as `verify` and `evaluate` do.
    """
    how = Measured(**measured)
    folder = output_folder(out)
    check_name("base model", base)
    check_name("repository", repository)
    source_metadata(folder)  # of a card that can't be read it is said before anything is measured
    if against is not None:
        check_source(folder, against)
    found = None
    if how.text is not None:
        found = evaluate(folder, how.text, against=against, progress=progress, **how.options())
    if processes.rank():
        return {}
    keep_source_card(folder)
    content = {**_facts(folder, base, repository, against), **_measurements(folder, against, found, how)}
    return _write(folder, content)


def _facts(folder: Path, base: str | None, repository: str | None, against: Any) -> dict[str, Any]:
    """Return what the manifest says of the run, and which model on the Hub it began with."""
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    earlier = read_report(folder) or {}
    known = manifest.get("base") or earlier.get("base")
    if base is not None:
        known = {"model": base, "revision": None}
    elif known is None and against is not None and not isinstance(open_files(against), LocalFolder):
        known = {"model": str(against), "revision": None}
    return {
        "reattend": reattend.__version__,
        "base": known,
        "repository": repository or earlier.get("repository"),
        "source": manifest["source"],
        "recipe": _without_paths(manifest["recipe"]),
        "earlier": [run | {"recipe": _without_paths(run["recipe"])} for run in manifest.get("earlier", [])],
        "texts": {purpose: _hash(record) for purpose, record in manifest["texts"].items()},
        "engines": manifest.get("engines", {}),
        "findings": manifest["findings"],
    }


def _hash(record: Any) -> str:
    return str(record["sha256"] if isinstance(record, dict) else record)


def _without_paths(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe to be published: of texts and teachers on this machine the name is told, and not the place."""
    told = dict(recipe)
    for key in ("calibration", "selection"):
        if told.get(key):
            told[key] = name_of(told[key])
    if told.get("evaluate"):
        told["evaluate"] = {**told["evaluate"], "text": name_of(told["evaluate"]["text"])}
    told["steps"] = [
        step | ({"teacher": name_of(step["teacher"])} if step.get("teacher") else {}) for step in told["steps"]
    ]
    return told


def name_of(place: str | os.PathLike[str]) -> str:
    """Return what a text or a model is called elsewhere: a dataset and a Hub id as they are, of a path the end."""
    text = os.fspath(place)
    return text if text.startswith(DATASET) or not Path(text).exists() else Path(text).resolve().name


def _measurements(folder: Path, against: Any, found: dict[str, Any] | None, how: Measured) -> dict[str, Any]:
    files = hash_files(folder)
    kept = read_report(folder) or {"verification": {"files": None}}
    same = kept["verification"]["files"] == files
    verification, before = kept["verification"], kept.get("before")
    if against is not None or not same:
        verification = _without(verify(folder, against=against), "model") | {"files": files}
        before = None if against is None else _sizes(against)
    evaluation, options = (kept.get("evaluation"), kept.get("evaluated_with")) if same else (None, None)
    if found is not None:
        evaluation, options = _without(found, "model") | {"text": name_of(how.text or "")}, how.options()
    return {
        "before": before, "after": _sizes(folder), "verification": verification, "evaluation": evaluation,
        "evaluated_with": options,
    }  # fmt: skip


def _sizes(model: Any) -> dict[str, Any]:
    looked = inspect(model)
    return {key: looked[key] for key in _SIZES}


def _without(found: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key not in keys}


def keep_source_card(folder: Path) -> None:
    """Move the card that came with the source aside, before the first report writes the output's own."""
    card = folder / CARD
    if card.is_file() and not (folder / REPORT).exists() and not (folder / SOURCE_CARD).exists():
        card.rename(folder / SOURCE_CARD)


def _write(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Write what is told of `content`; report.json, which makes it valid, last."""
    earlier = read_report(folder) or {}
    content |= {"commands": commands(content), "variables": variables(content), "not_measured": dict(_gaps(content))}
    drawn = plots(content)
    _clear(folder)
    if drawn:
        (folder / PLOTS).mkdir(exist_ok=True)
    for name, picture in drawn.items():
        put(folder / PLOTS / f"{name}.png", picture)
    put(folder / REPORT_TEXT, document(content, list(drawn)).encode())
    content["card"], content["remarks"] = _write_card(folder, content, earlier.get("card"))
    put(folder / REPORT, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    return content


def _write_card(folder: Path, content: dict[str, Any], written: str | None) -> tuple[str | None, list[str]]:
    """Write the card, but not over one that was edited; return the hash of what we wrote last, and remarks."""
    path = folder / CARD
    if path.exists() and sha256_of(path) != written:
        return written, [f"{CARD} was edited, and is kept as it is; remove it to have it written anew"]
    put(path, write_card(folder, content).encode())
    return sha256_of(path), []


def _gaps(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what was not measured, and what would measure it."""
    evaluation = content["evaluation"] or {}
    if content["verification"].get("logits_error") is None:
        yield "errors of logits and layers", "--against MODEL"
    if content["before"] is None:
        yield "sizes before", "--against MODEL"
    if not evaluation:
        yield "perplexity and cache", "--text TEXT"
    elif "base_perplexity" not in evaluation and "outliers" not in evaluation:
        yield "perplexity before", "--against MODEL --text TEXT"
    if "outliers" not in evaluation:
        yield "outliers", "--text TEXT --outliers"
    if not any("sensitivity" in found for found in content["findings"]):
        yield "sensitivity of each linear layer to int8", "reattend sensitivity MODEL"


def _clear(folder: Path) -> None:
    """Remove an earlier report's plots: they may show what no longer is measured."""
    for picture in (folder / PLOTS).glob("*.png"):
        picture.unlink()


def put(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. Raises `Refusal` where it can't be written."""
    aside = path.with_name(f".{path.name}.new")
    try:
        aside.write_bytes(content)
        aside.replace(path)
    except OSError as error:
        raise Refusal(f"{path}: can't be written ({error.strerror or error})") from error
