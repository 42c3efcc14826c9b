"""Stored tensors and the parameters that hold them: which are trained, in which groups, and as they are written."""

import fnmatch
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from reattend.checkpoint.header import TensorSpec
from reattend.checkpoint.tensors import TORCH_DTYPES
from reattend.errors import Refusal
from reattend.families.source import Source
from reattend.healing.settings import Settings

TRAINED = ("F32", "F16", "BF16")


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a tensor's name matches one of the shell patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def trained_specs(source: Source, settings: Settings) -> list[TensorSpec]:
    """Return the tensors that are trained, in the order of their names; of two that are tied, both or none."""
    every = [source.tensors[name] for name in sorted(source.tensors)]
    tied = _tied(source)
    chosen = {spec.name for spec in every if matches(spec.name, settings.train)}
    chosen |= tied if chosen & tied else set()
    return [spec for spec in every if spec.dtype in TRAINED and spec.name in chosen]


def _tied(source: Source) -> set[str]:
    """Return the names of the embedding and of the head, where these are one and may be stored twice."""
    names = (f"{source.prefix}{source.family.embedding}.weight", f"{source.family.head}.weight")
    return {name for name in names if name in source.tensors} if source.tied else set()


def find_parameters(model: Any, source: Source) -> dict[str, nn.Parameter]:
    """Return the parameter of each stored tensor by the tensor's name; tensors that are tied have the same one.

    Raises `Refusal` where the model has a parameter that no tensor of the checkpoint holds.
    """
    held = {name: parameter for name in source.tensors if (parameter := _parameter(model, name)) is not None}
    known = {id(parameter) for parameter in held.values()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in known:
            raise Refusal(f"heal: parameter {name!r} of {type(model).__name__} is stored under another name or shape")
    return held


def choose_trained(every: Mapping[str, nn.Parameter], source: Source, settings: Settings) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained; freeze the others."""
    for parameter in every.values():
        parameter.requires_grad_(False)
    trained = {spec.name: every[spec.name] for spec in trained_specs(source, settings) if spec.name in every}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return trained


def once(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return each parameter under the first of its names."""
    first: dict[int, str] = {}
    for name, parameter in parameters.items():
        first.setdefault(id(parameter), name)
    return {name: parameters[name] for name in first.values()}


def _parameter(model: Any, name: str) -> nn.Parameter | None:
    """Return the parameter under a stored name, with or without the prefix of the model's body; None for a buffer."""
    for full in (name, f"{model.base_model_prefix}.{name}"):
        try:
            found: nn.Parameter = model.get_parameter(full)
        except AttributeError:
            continue
        return found
    return None


def optimiser_for(parameters: Mapping[str, nn.Parameter], settings: Settings) -> torch.optim.AdamW:
    """Return AdamW over four kinds of groups: new or not, by decay. A group's `new` says which, its rate is 1.

    Matrices decay by `weight_decay`, norm weights (vectors called weight) by `norm_decay`, biases not at all.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        key = (matches(name, settings.new), _decay(name, parameter, settings))
        groups.setdefault(key, []).append(parameter)
    listed = [{"params": p, "new": new, "weight_decay": decay} for (new, decay), p in groups.items()]
    return torch.optim.AdamW(listed, lr=1.0, betas=(0.9, 0.95), eps=1e-8)


def _decay(name: str, parameter: Tensor, settings: Settings) -> float:
    if parameter.ndim > 1:
        return settings.weight_decay
    return settings.norm_decay if name.endswith("weight") else 0.0


@contextmanager
def as_written(parameters: Mapping[str, nn.Parameter], source: Source) -> Iterator[None]:
    """Round the parameters to the dtypes of their tensors for a while: what is evaluated is what is written."""
    rounded = {name: p for name, p in parameters.items() if TORCH_DTYPES[source.tensors[name].dtype] != p.dtype}
    exact = {name: parameter.detach().clone() for name, parameter in rounded.items()}
    try:
        with torch.no_grad():
            for name, parameter in rounded.items():
                parameter.copy_(parameter.to(TORCH_DTYPES[source.tensors[name].dtype]))
        yield
    finally:
        with torch.no_grad():
            for name, parameter in rounded.items():
                parameter.copy_(exact[name])
