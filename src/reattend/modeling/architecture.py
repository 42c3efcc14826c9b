"""The class of transformers that a config names, and how its errors are told."""

from pathlib import Path
from typing import Any

from reattend.errors import Failure, Refusal

_LONGEST = 300  # characters of another library's message


def told(error: Exception) -> str:
    """Return a foreign error in one line of some length: its type too, where the message may say little alone."""
    text = " ".join(str(error).split())
    plain = isinstance(error, (OSError, ValueError, RuntimeError)) and text
    text = text if plain else f"{type(error).__name__}: {text}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def model_class(path: Path, config: dict[str, Any]) -> Any:
    """Return the class that a config's `architectures` name, or the automatic one where there are none."""
    import transformers

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
