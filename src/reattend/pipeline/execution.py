"""apply(): run a plan as one streamed pass; the output appears whole or not at all."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

import reattend
from reattend.checkpoint.files import LocalFolder, open_files
from reattend.checkpoint.index import INDEX, fingerprint
from reattend.checkpoint.staging import MAX_SHARD_BYTES, Staging
from reattend.checkpoint.tensors import ShardReader, all_finite, bytes_view, tensor_bytes
from reattend.errors import Failure, Refusal
from reattend.pipeline.planning import Plan, plan
from reattend.recipes.schema import dump_recipe
from reattend.transform import Group

Progress = Callable[[int, int], None]


def apply(
    recipe: str | os.PathLike[str] | Sequence[BaseModel],
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Plan:
    """Write `model` rewritten by `recipe` to the folder `out`; return the plan that was run.

    `progress(done, total)` is told source bytes. Raises `Refusal` before anything is written, or, for NaN
    and inf in the weights, after removing what was; `Failure` when the disk fails, keeping the part for
    `resume`. The same inputs give the same bytes, interrupted or not.
    """
    planned = plan(recipe, _local(model), max_shard_bytes=max_shard_bytes)
    target = Path(os.path.abspath(out))
    _check_place(planned, target)
    staging = Staging(target, _run_key(planned), resume=resume, overwrite=overwrite)
    with staging:
        _check_space(planned, staging)
        try:
            staging.open_shards(planned.layout)
            _stream(planned, staging, progress)
            _write_sidecars(planned, staging)
            staging.commit()
        except Refusal:
            staging.discard()
            raise
        except OSError as error:
            kept = f"what was written is kept in {staging.folder} for --resume"
            raise Failure(f"{target}: {error.strerror or error}; {kept}") from error
    return planned


def _local(model: str | os.PathLike[str]) -> Path:
    """Return the folder of a model, downloading a Hub repository if that is what `model` names."""
    files = open_files(model)
    return files.path if isinstance(files, LocalFolder) else files.download()


def _check_place(planned: Plan, out: Path) -> None:
    inside = Path(planned.checkpoint.files.name).resolve()
    if out.resolve() == inside or inside in out.resolve().parents:
        raise Refusal(f"{out}: lies inside the input {inside}")
    if out.resolve() in inside.parents:
        raise Refusal(f"{out}: contains the input {inside}")
    if out.exists() and not out.is_dir():
        raise Refusal(f"{out}: is a file")
    if not out.parent.is_dir():
        raise Refusal(f"{out.parent}: no such folder")
    if out.is_mount():
        raise Refusal(f"{out}: is a mount point, which a finished output can't be renamed to; name a folder in it")


def _check_space(planned: Plan, staging: Staging) -> None:
    present = sum(f.stat().st_blocks * 512 for f in staging.folder.rglob("*") if f.is_file())
    free = shutil.disk_usage(staging.folder).free
    if planned.disk_bytes > free + present:
        if not staging.done:
            staging.discard()
        raise Refusal(f"{staging.out}: needs {planned.disk_bytes} bytes, {free} are free")


def _run_key(planned: Plan) -> dict[str, Any]:
    """What must be the same for a run to be resumed; times of change catch weights edited meanwhile."""
    folder = Path(planned.checkpoint.files.name)
    times = {f: (folder / f).stat().st_mtime_ns for f in sorted(planned.checkpoint.digests)}
    headers = [hashlib.sha256(header).hexdigest() for header in planned.layout.headers.values()]
    return {**_manifest(planned), "times": times, "headers": headers}


def _manifest(planned: Plan) -> dict[str, Any]:
    return {
        "reattend": reattend.__version__,
        "steps": [step.model_dump(mode="json") for step in planned.steps],
        "source": fingerprint(planned.checkpoint),
        "tolerance": planned.transform.tolerance,
    }


def _stream(planned: Plan, staging: Staging, progress: Progress) -> None:
    reader = ShardReader(Path(planned.checkpoint.files.name))
    done, total = 0, planned.checkpoint.nbytes
    try:
        for number, group in enumerate(planned.groups):
            if number not in staging.done:
                run = _copy if planned.is_copy(group) else _rewrite
                run(planned, group, reader, staging)
                staging.finish_group(number)
            done += sum(planned.source.tensors[name].nbytes for name in group.reads)
            progress(done, total)
    finally:
        reader.close()


def _copy(planned: Plan, group: Group, reader: ShardReader, staging: Staging) -> None:
    stored = planned.checkpoint.tensors[group.reads[0]]
    file, start = planned.layout.places[stored.spec.name]
    for offset, block in reader.blocks(stored):
        if not all_finite(block, stored.spec.dtype):
            raise Refusal(f"{stored.file}: tensor {stored.spec.name!r} holds NaN or inf")
        staging.write(file, bytes_view(block), start + offset)


def _rewrite(planned: Plan, group: Group, reader: ShardReader, staging: Staging) -> None:
    tensors = {name: reader.read(planned.checkpoint.tensors[name]) for name in group.reads}
    written = planned.transform.apply(group, tensors)
    for spec in group.writes:
        tensor = written[spec.name]
        data = tensor_bytes(tensor)
        assert tuple(tensor.shape) == spec.shape, spec
        assert len(data) == spec.nbytes, spec
        # A NaN or inf that goes in comes out in some float: so only what is written needs the look.
        if not all_finite(torch.frombuffer(data, dtype=torch.uint8), spec.dtype):
            raise Refusal(f"tensors {', '.join(group.reads)}: hold NaN or inf")
        file, start = planned.layout.places[spec.name]
        staging.write(file, data, start)


def _write_sidecars(planned: Plan, staging: Staging) -> None:
    """Copy every other file, then write what declares the checkpoint complete."""
    folder = Path(planned.checkpoint.files.name)
    for file in planned.checkpoint.sidecars:
        staging.copy_file(folder / file, file)
    staging.add_file("recipe.yaml", dump_recipe(list(planned.steps)).encode())
    staging.add_file("reattend.json", _json(_manifest(planned)))
    index = planned.layout.index()
    if index is not None:
        staging.add_file(INDEX, index)
    staging.add_file("config.json", _json(dict(planned.result.config)))


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
