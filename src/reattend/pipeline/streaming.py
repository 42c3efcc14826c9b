"""Stream a pass's groups from shards to the staged output."""

from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from reattend.checkpoint.header import StoredTensor
from reattend.checkpoint.index import Checkpoint
from reattend.checkpoint.staging import Staging
from reattend.checkpoint.tensors import ShardReader, all_finite, bytes_view, tensor_bytes
from reattend.errors import BadNumbersError
from reattend.pipeline.passes import Pass
from reattend.progress import Progress
from reattend.transform import Group, Statistics


def stream(steps: Pass, checkpoint: Checkpoint, statistics: Statistics, staging: Staging, progress: Progress) -> None:
    """Rewrite `checkpoint` group by group, skipping the groups that the staging folder holds already."""
    staging.open_shards(steps.layout, {number: _ends(steps, group) for number, group in enumerate(steps.groups)})
    reader = ShardReader(Path(checkpoint.files.name))
    sizes = [sum(steps.source.tensors[name].nbytes for name in group.reads) for group in steps.groups]
    done = sum(sizes[number] for number in staging.done)
    progress("rewriting", done, checkpoint.nbytes)
    todo = [number for number in range(len(sizes)) if number not in staging.done]
    try:
        for number, following in zip_longest(todo, todo[1:]):
            group = steps.groups[number]
            if following is not None:
                reader.expect([checkpoint.tensors[name] for name in steps.groups[following].reads])
            if not group.key:
                _copy(steps, checkpoint, group, reader, staging)
            else:
                _rewrite(steps, checkpoint, group, reader, staging, statistics)
            staging.finish_group(number)
            done += sizes[number]
            progress("rewriting", done, checkpoint.nbytes)
    finally:
        reader.close()


def _ends(steps: Pass, group: Group) -> dict[str, int]:
    """How far a group's tensors reach into each shard."""
    ends: dict[str, int] = {}
    for spec in group.writes:
        file, start = steps.layout.places[spec.name]
        ends[file] = max(ends.get(file, 0), start + spec.nbytes)
    return ends


def _copy(steps: Pass, checkpoint: Checkpoint, group: Group, reader: ShardReader, staging: Staging) -> None:
    stored = checkpoint.tensors[group.reads[0]]
    file, start = steps.layout.places[stored.spec.name]
    for offset, block in reader.blocks(stored):
        if not all_finite(block, stored.spec.dtype):
            raise _bad_numbers(checkpoint, stored)
        staging.write(file, bytes_view(block), start + offset)


def _rewrite(
    steps: Pass,
    checkpoint: Checkpoint,
    group: Group,
    reader: ShardReader,
    staging: Staging,
    statistics: Statistics,
) -> None:
    tensors = reader.read_group([checkpoint.tensors[name] for name in group.reads])
    written = steps.rewrite(group, tensors, statistics)
    for spec in group.writes:
        tensor = written[spec.name]
        data = tensor_bytes(tensor)
        assert tuple(tensor.shape) == spec.shape, spec
        assert len(data) == spec.nbytes, spec
        # A NaN or inf that goes in comes out in some float: so only what is written needs the look.
        if not all_finite(torch.frombuffer(data, dtype=torch.uint8), spec.dtype):
            raise _culprit(checkpoint, tensors, spec.name)
        file, start = steps.layout.places[spec.name]
        staging.write(file, data, start)


def _bad_numbers(checkpoint: Checkpoint, stored: StoredTensor) -> BadNumbersError:
    return BadNumbersError(f"{checkpoint.files.name}/{stored.file}: tensor {stored.spec.name!r} holds NaN or inf")


def _culprit(checkpoint: Checkpoint, tensors: Mapping[str, Tensor], written: str) -> BadNumbersError:
    """Say where a NaN or inf in `written` comes from: a tensor that was read, or else the step itself."""
    places = [checkpoint.tensors[name] for name in tensors]
    for stored in places:
        data = torch.frombuffer(tensor_bytes(tensors[stored.spec.name]), dtype=torch.uint8)
        if not all_finite(data, stored.spec.dtype):
            return _bad_numbers(checkpoint, stored)
    first = f"{checkpoint.files.name}/{places[0].file}: tensor {places[0].spec.name!r}"
    return BadNumbersError(f"{first} is finite, but the step makes NaN or inf of it, in {written!r}")
