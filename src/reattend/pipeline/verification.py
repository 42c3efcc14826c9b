"""verify(): prove in a fresh process, with stock transformers only, that an output is sound."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reattend.checkpoint.files import open_files
from reattend.checkpoint.index import MANIFEST, Checkpoint, fingerprint, open_checkpoint, read_json
from reattend.errors import Failure, Refusal
from reattend.families.attention_kinds import check_kinds
from reattend.families.portable import portable_classes
from reattend.families.source import source_of
from reattend.modeling.int8_outliers import check_outliers
from reattend.modeling.loading import load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

_PROBE = Path(__file__).with_name("probe.py")
# Natural text, as random ids would meet the model far from where it is used.
_PASSAGE = (
    "The river rises in the hills north of the town and runs for about ninety kilometres to the sea. In "
    "1874 a bridge of iron was built where the old ferry had crossed; it carried the railway until 1962, "
    "when the line was closed. Today the station is a small museum, and the path along the water is used "
    "by walkers, who come for the birds in spring and for the quiet in every other season of the year."
)


def verify(out: str | os.PathLike[str], *, against: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Check `out`, a folder or a Hub id, and its logits against the source model `against` if given.

    Returns `problems` (empty means sound), and with `against` the `logits_error` (relative L2 over all
    logits of a short passage, both in fp32) beside the `tolerance` that the step declared, and `layer_errors`: the
    same of what each layer puts out, the last one after the final norm (None where the number of layers differs).
    Raises `Refusal` where `out` is no output of reattend or `against` is not its source.
    """
    checkpoint = open_checkpoint(out)
    described = source_of(checkpoint)
    check_outliers(checkpoint, described)
    check_kinds(checkpoint.files.name, described)
    manifest = _manifest(checkpoint)
    folder = open_files(out).download()
    _check_code(folder, checkpoint.config)
    source = None if against is None else _source(manifest, against)
    ids = _token_ids(checkpoint, folder)
    # The source comes first: what loading quantised weights may change in the process must not reach it.
    folders = {"out": folder} if source is None else {"source": source, "out": folder}
    with tempfile.TemporaryDirectory() as scratch:
        found = _probe(folders, ids, Path(scratch))
        problems = found["out"]
        report: dict[str, Any] = {
            "model": str(out),
            "problems": problems,
            "tensors": len(checkpoint.tensors),
        }
        if source is None:
            return report
        problems += [f"source: {problem}" for problem in found["source"]]
        error, layers = _errors(Path(scratch, "out.pt"), Path(scratch, "source.pt"))
    report |= {"logits_error": error, "tolerance": manifest["tolerance"], "tokens": len(ids), "layer_errors": layers}
    if not error <= manifest["tolerance"]:
        problems.append(f"logits differ by {error:.4g}, more than {manifest['tolerance']}")
    return report


def _manifest(checkpoint: Checkpoint) -> dict[str, Any]:
    manifest = read_json(checkpoint.files, checkpoint.sizes, MANIFEST)  # only our outputs have one
    tolerance = manifest.get("tolerance")
    number = isinstance(tolerance, (int, float)) and not isinstance(tolerance, bool)
    if not number or not isinstance(manifest.get("source"), str):
        raise Refusal(f"{checkpoint.files.name}/{MANIFEST}: is damaged")
    return manifest


def _check_code(folder: Path, config: dict[str, Any]) -> None:
    """Refuse to run code that is not what this version of reattend puts into an output."""
    classes = portable_classes(config)
    if classes is None:
        return  # loaded by the class of transformers, whatever code the folder holds
    for name, content in classes.code():
        if not (folder / name).is_file() or (folder / name).read_bytes() != content:
            raise Refusal(f"{folder}/{name}: is not the code of this version of reattend; it is not run")
    if (folder / "custom_generate").exists():  # transformers would run it as soon as it loads the model
        raise Refusal(f"{folder}/custom_generate: is not the code of this version of reattend; it is not run")


def check_source(out: str | os.PathLike[str], against: str | os.PathLike[str]) -> None:
    """Raise `Refusal` where `against` is not what the output `out` was made from."""
    _matching(_manifest(open_checkpoint(out)), against)


def _matching(manifest: dict[str, Any], against: str | os.PathLike[str]) -> Checkpoint:
    checkpoint = open_checkpoint(against)
    if fingerprint(checkpoint) != manifest["source"]:
        raise Refusal(f"{against}: is not the source that {MANIFEST} records")
    return checkpoint


def _source(manifest: dict[str, Any], against: str | os.PathLike[str]) -> Path:
    checkpoint = _matching(manifest, against)
    source_of(checkpoint)  # of a family that is known, so that the probe needs no foreign code
    folder = open_files(against).download()
    _check_code(folder, checkpoint.config)
    return folder


def _token_ids(checkpoint: Checkpoint, folder: Path) -> list[int]:
    tokenizer = load_tokenizer(folder)
    if tokenizer is not None:
        return list(tokenizer(_PASSAGE).input_ids)
    vocab = source_of(checkpoint).size("vocab")
    return [(7919 * i + 13) % vocab for i in range(32)]  # no tokenizer: ids spread over the vocabulary


def _probe(folders: dict[str, Path], ids: list[int], scratch: Path) -> dict[str, list[str]]:
    """Probe models in one fresh process, where most of the time goes into imports; return the problems of each."""
    (scratch / "ids.json").write_text(json.dumps(ids))
    arguments = [str(scratch / "ids.json"), *(f"{name}={folder}" for name, folder in folders.items())]
    done = subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", str(_PROBE), *arguments],
        capture_output=True, text=True, env=_environment(), check=False,
    )  # fmt: skip
    results = {name: scratch / f"{name}.json" for name in folders}
    for name, result in results.items():
        if not result.exists():
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise Failure(f"{folders[name]}: stock transformers can't load it: {last}")
    return {name: json.loads(result.read_text()) for name, result in results.items()}


def _environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _errors(out: Path, source: Path) -> tuple[float, list[float] | None]:
    """Return the relative L2 error of the logits, and of each layer's output if there are as many layers."""
    import torch

    ours, theirs = (torch.load(outputs, weights_only=True) for outputs in (out, source))
    error = _distance(ours["logits"], theirs["logits"])
    if len(ours["layers"]) != len(theirs["layers"]):
        return error, None
    return error, [_distance(*pair) for pair in zip(ours["layers"], theirs["layers"], strict=True)]


def _distance(ours: "Tensor", theirs: "Tensor") -> float:
    if ours.shape != theirs.shape:
        raise Failure(f"logits have shape {tuple(ours.shape)}, the source's {tuple(theirs.shape)}")
    return float((ours - theirs).norm() / theirs.norm())
