"""The student and its teacher in memory: stock transformers, in evaluation mode, so that no dropout draws numbers."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed

from reattend import processes
from reattend.calibration.layerwise import layers_in
from reattend.errors import Refusal
from reattend.families.source import Source
from reattend.healing.parameters import trained_specs
from reattend.healing.settings import Settings
from reattend.modeling.loading import free_bytes, load, load_tokenizer


def training_bytes(source: Source, settings: Settings) -> int:
    """Return the bytes of weights, gradients, moments and a teacher of the same size; activations not counted.

    With `shard` each process has its share of them, when all are loaded.
    """
    specs = trained_specs(source, settings)
    trained = sum(spec.numel for spec in specs)
    rounded = sum(spec.numel for spec in specs if spec.dtype != "F32")  # kept aside during an evaluation
    teacher = source.parameters * (2 if settings.precision == "bf16" else 4) if settings.distils else 0
    return 4 * source.parameters + 12 * trained + 4 * rounded + teacher


def check_memory(source: Source, settings: Settings, device: str) -> None:
    """Refuse what does not fit; `shard` is counted where processes have GPUs of their own."""
    own = device != "cpu" and settings.shard
    needed, free = training_bytes(source, settings) // (processes.count() if own else 1), free_bytes(device)
    if needed > free:
        raise Refusal(f"heal: training needs {needed} bytes on {device} and activations, {free} are free")


def check_tokenizers(folder: Path, teacher: Path) -> None:
    """Refuse a teacher to which the same ids are other tokens."""
    ours, theirs = load_tokenizer(folder), load_tokenizer(teacher)
    if theirs is None:
        raise Refusal(f"{teacher}: has no tokenizer that says whether its tokens are those of the model")
    if ours.get_vocab() != theirs.get_vocab():
        raise Refusal(f"heal: teacher: {teacher} has another vocabulary than {folder}")


def load_student(folder: Path, source: Source, settings: Settings, device: str) -> Any:
    """Load the model to train: weights in fp32."""
    model, _ = load(folder, dtype="float32", device=_first_place(settings, device), runtime="stock", offload=False)
    if settings.recompute:
        for layer in layers_in(model, source.family):
            layer.forward = partial(recomputed, layer.forward, use_reentrant=False)
    return _sharded(model, source, settings, device)


def load_teacher(folder: Path, source: Source, settings: Settings, device: str) -> Any:
    """Load the model to follow, without gradients."""
    dtype = "bfloat16" if settings.precision == "bf16" else "float32"
    model, _ = load(folder, dtype=dtype, device=_first_place(settings, device), runtime="stock", offload=False)
    return _sharded(model.requires_grad_(False), source, settings, device)


def _first_place(settings: Settings, device: str) -> str:
    """Where weights are loaded to: those that will be split may not fit on one GPU."""
    return "cpu" if _splits(settings) else device


def _splits(settings: Settings) -> bool:
    return settings.shard and processes.count() > 1


def _sharded(model: Any, source: Source, settings: Settings, device: str) -> Any:
    """Split the weights over the processes, layer by layer (FSDP2)."""
    if not _splits(settings):
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.device(device).type, (processes.count(),))
    modules: list[nn.Module] = [*layers_in(model, source.family), model]
    for module in modules:
        # The outermost too: gathered weights that stayed would be those that were rounded for an evaluation.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return model
