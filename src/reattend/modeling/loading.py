"""load(): a checkpoint, converted or not, as a running model with its tokenizer."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from reattend.checkpoint.files import open_files
from reattend.checkpoint.index import read_json
from reattend.errors import Failure, Refusal, first_line

_LIBRARIES = {"compressed-tensors": "compressed_tensors", "bitsandbytes": "bitsandbytes"}


class Loaded(NamedTuple):
    """A model in evaluation mode and its tokenizer (None where the checkpoint has none)."""

    model: Any
    tokenizer: Any


def load(path: str | os.PathLike[str], *, dtype: str = "auto", device: str = "cpu") -> Loaded:
    """Load a checkpoint through stock transformers; `dtype` is a torch dtype's name or "auto".

    Raises `Refusal` for a folder that is not a checkpoint or a quantisation library that is absent.
    """
    import transformers

    path = open_files(path).download()
    config = _config(path)
    _check_library(config)
    names = config.get("architectures") or []
    kind = getattr(transformers, names[0], None) if names else transformers.AutoModelForCausalLM
    if kind is None:
        raise Refusal(f"{path}/config.json: architecture {names[0]!r} is unknown to transformers")
    try:
        model = kind.from_pretrained(path, dtype=dtype, device_map={"": device}).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise Failure(f"{path}: transformers can't load it: {first_line(error)}") from error
    if dtype != "auto":
        _cast(model, dtype)
    return Loaded(model, load_tokenizer(path))


def _cast(model: Any, dtype: str) -> None:
    """Cast what the loader of bitsandbytes leaves in its stored dtype; codes stay as they are."""
    import torch

    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(getattr(torch, dtype))


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """Return the checkpoint's tokenizer, or None where it has no tokenizer files."""
    from transformers import AutoTokenizer

    if not any(Path(path).glob("tokenizer*")) and not (Path(path) / "vocab.json").exists():
        return None
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:
        raise Failure(f"{path}: its tokenizer can't be loaded: {first_line(error)}") from error


def _config(path: Path) -> dict[str, Any]:
    files = open_files(path)
    config = read_json(files, files.sizes(), "config.json")
    for key, kind in (("architectures", list), ("quantization_config", dict)):
        if not isinstance(config.get(key) or kind(), kind):
            raise Refusal(f"{path}/config.json: {key} is not a {kind.__name__}")
    return config


def _check_library(config: dict[str, Any]) -> None:
    from importlib.util import find_spec

    method = (config.get("quantization_config") or {}).get("quant_method")
    library = _LIBRARIES.get(str(method))
    if library and find_spec(library) is None:
        raise Refusal(f"{method} is not installed, and the checkpoint needs it: pip install {method}")
