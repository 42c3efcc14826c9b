"""Open a checkpoint from its headers and config alone; every inconsistency is refused here."""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from reattend.checkpoint.files import Files, open_files
from reattend.checkpoint.header import Header, StoredTensor, read_header
from reattend.errors import Refusal

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MANIFEST = "reattend.json"
RECIPE = "recipe.yaml"
CARD = "README.md"
SOURCE_CARD = "SOURCE_README.md"  # where an output keeps its source's card once it has its own
REPORT = "report.json"
REPORT_TEXT = "REPORT.md"
PLOTS = "report"  # a folder
OUTLIERS = "int8_outliers"  # a folder of weights that no stock loader looks into
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHTS = (".safetensors", ".gguf", ".onnx", ".onnx_data", ".msgpack", ".h5", ".tflite", *PICKLES)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk or on the Hub, known by its headers.

    `digests` maps each shard to the sha256 of its header; `ignored` are weight files that belong to no
    shard of it (other formats, stale copies) and that an output therefore must not carry; `skipped` maps what
    else is not copied, as it is no file, to what it is.
    """

    files: Files
    config: dict[str, Any]
    sizes: dict[str, int]
    tensors: dict[str, StoredTensor]
    digests: dict[str, str]
    metadata: dict[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.spec.nbytes for tensor in self.tensors.values())

    @property
    def sidecars(self) -> list[str]:
        """Files that are neither weights nor written anew: they are copied byte for byte."""
        made = {"config.json", INDEX, SINGLE, MANIFEST, RECIPE, *self.digests, *self.reported}
        return [f for f in self.sizes if f not in made and f not in self.ignored]

    @property
    def reported(self) -> list[str]:
        """Files of an output's own report and card, which would be untrue of what is made of it."""
        if MANIFEST not in self.sizes or REPORT not in self.sizes:
            return []
        return [f for f in self.sizes if is_reported(f)]


def is_reported(file: str) -> bool:
    """Whether a file of an output is one that `report` writes."""
    plot = file.startswith(f"{PLOTS}/") and file.endswith(".png") and file.count("/") == 1
    return plot or file in (CARD, REPORT, REPORT_TEXT)


def open_checkpoint(model: str | os.PathLike[str]) -> Checkpoint:
    """Open `model`, a folder or a Hub id. Raises `Refusal` for anything that is not a sound checkpoint."""
    files = open_files(model)
    sizes = files.sizes()
    config = read_json(files, sizes, "config.json")
    listed = _shards(files, sizes)
    tensors: dict[str, StoredTensor] = {}
    digests: dict[str, str] = {}
    metadata: dict[str, str] = {}
    for shard in dict.fromkeys(listed.values()) if listed else [SINGLE]:
        header = _header(files, shard, sizes[shard])
        _add(files, tensors, header.tensors)
        digests[shard] = header.digest
        metadata = header.metadata | metadata
    _check_listed(files, listed, tensors)
    ignored = tuple(f for f in sizes if f not in digests and _is_foreign(f, config))
    return Checkpoint(files, config, sizes, tensors, digests, metadata, ignored, files.skipped())


def _is_foreign(file: str, config: dict[str, Any]) -> bool:
    """Whether a file holds weights that are not the checkpoint's; those of outlier columns stay with an int8 one."""
    if file.partition("/")[0] == OUTLIERS:
        return config.get("int8_outliers") != {"mode": "static"}
    return file.endswith(WEIGHTS)


def _header(files: Files, shard: str, size: int) -> Header:
    """Read a header; a refusal, which starts with the file's name, names the folder as well."""
    try:
        return read_header(lambda start, length: files.read(shard, start, length), size, shard)
    except Refusal as refusal:
        start = "" if str(refusal).startswith(files.name) else f"{files.name}/"
        raise Refusal(f"{start}{refusal}") from refusal


def read_json(files: Files, sizes: dict[str, int], file: str) -> dict[str, Any]:
    """Read a JSON object; refuse a missing file, another encoding than UTF-8, another type."""
    if file not in sizes:
        raise Refusal(f"{files.name}: has no {file}")
    try:
        value = json.loads(files.read(file, 0, sizes[file]).decode("utf-8"))
    except RecursionError as error:
        raise Refusal(f"{files.name}/{file}: nested too deeply") from error
    except ValueError as error:
        raise Refusal(f"{files.name}/{file}: not UTF-8 JSON ({error})") from error
    if not isinstance(value, dict):
        raise Refusal(f"{files.name}/{file}: not a JSON object")
    return value


def _shards(files: Files, sizes: dict[str, int]) -> dict[str, str]:
    """Return tensor -> shard of an index, or nothing for a single file."""
    if INDEX in sizes and SINGLE in sizes:
        raise Refusal(f"{files.name}: holds both {SINGLE} and {INDEX}; remove the stale one")
    if SINGLE in sizes:
        return {}
    if INDEX not in sizes:
        pickles = [f for f in sizes if f.endswith(PICKLES)]
        if pickles:
            raise Refusal(f"{files.name}/{pickles[0]}: pickled weights are not read; convert to safetensors first")
        raise Refusal(f"{files.name}: has neither {SINGLE} nor {INDEX}")
    listed = read_json(files, sizes, INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise Refusal(f"{files.name}/{INDEX}: weight_map is missing or empty")
    for name, shard in listed.items():
        _check_shard(f"{files.name}/{INDEX}", name, shard, sizes)
    return listed


def _check_shard(index: str, name: str, shard: Any, sizes: dict[str, int]) -> None:
    if not isinstance(shard, str) or PurePosixPath(shard).name != shard or "\\" in shard or "\0" in shard:
        raise Refusal(f"{index}: shard name {shard!r} of {name!r} is not a plain file name")
    if shard not in sizes:
        raise Refusal(f"{index}: names {shard!r}, which is not there")
    if not shard.endswith(".safetensors"):
        raise Refusal(f"{index}: shard {shard!r} is not a safetensors file")


def _add(files: Files, tensors: dict[str, StoredTensor], more: tuple[StoredTensor, ...]) -> None:
    for stored in more:
        name = stored.spec.name
        if name in tensors:
            raise Refusal(f"{files.name}: tensor {name!r} is in both {tensors[name].file} and {stored.file}")
        tensors[name] = stored


def _check_listed(files: Files, listed: dict[str, str], tensors: dict[str, StoredTensor]) -> None:
    for name, shard in listed.items():
        if name not in tensors or tensors[name].file != shard:
            raise Refusal(f"{files.name}/{INDEX}: lists {name!r} in {shard}, which does not hold it")


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return the sha256 over the config, the header hashes and every file's size, cards apart.

    An output is the same model before and after its report.
    """
    weights = {f: checkpoint.sizes[f] for f in checkpoint.digests}
    sidecars = {f: checkpoint.sizes[f] for f in checkpoint.sidecars if f not in (CARD, SOURCE_CARD)}
    record = [checkpoint.config, checkpoint.digests, weights, sidecars]
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
