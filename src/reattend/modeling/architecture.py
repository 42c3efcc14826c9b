"""The class of transformers that a config names, and how its errors are told."""

from importlib import import_module
from pathlib import Path
from typing import Any

from reattend.errors import Failure, Refusal
from reattend.families.portable import portable_classes

_LONGEST = 300  # characters of another library's message


def told(error: Exception) -> str:
    """Return a foreign error in one line of some length: its type too, where the message may say little alone."""
    text = " ".join(str(error).split())
    plain = isinstance(error, (OSError, ValueError, RuntimeError)) and text
    text = text if plain else f"{type(error).__name__}: {text}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def model_config(path: Path, config: dict[str, Any]) -> Any:
    """Return the folder's config as the class of `model_class` takes it."""
    import transformers

    portable = _portable_class(path, config)
    found = transformers.AutoConfig if portable is None else portable.config_class
    return found.from_pretrained(path)


def _portable_class(path: Path, config: dict[str, Any]) -> Any:
    """Return a portable model's class as it is installed here; what a checkpoint brings along is never run."""
    try:
        classes = portable_classes(config)
    except Refusal as refusal:
        raise Refusal(f"{path}/{refusal}") from refusal
    if classes is None:
        return None
    module = import_module(f"reattend.modeling.portable.{classes.module}")
    return getattr(module, config["architectures"][0])


def model_class(path: Path, config: dict[str, Any]) -> Any:
    """Return the class that a config's `architectures` name, or the automatic one where there are none."""
    import transformers

    portable = _portable_class(path, config)
    if portable is not None:
        return portable
    names = config.get("architectures") or []
    if not names:
        return transformers.AutoModelForCausalLM
    try:
        kind = getattr(transformers, names[0], None)
    except Exception as error:  # importing the model's module
        raise Failure(f"{path}: transformers can't import {names[0]}: {told(error)}") from error
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise Refusal(f"{path}/config.json: architecture {names[0]!r} is unknown to transformers")
    return kind
