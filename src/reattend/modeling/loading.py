"""load(): a checkpoint, converted or not, as a running model with its tokenizer."""

import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any, NamedTuple

from reattend.checkpoint.files import open_files
from reattend.checkpoint.index import open_checkpoint, read_json
from reattend.errors import Failure, Refusal, first_line

_LIBRARIES = {"compressed-tensors": "compressed_tensors", "bitsandbytes": "bitsandbytes"}
_SHARE_OF_MEMORY = 0.8  # of what is free: activations and logits need the rest


class Loaded(NamedTuple):
    """A model in evaluation mode and its tokenizer (None where the checkpoint has none)."""

    model: Any
    tokenizer: Any


def load(
    path: str | os.PathLike[str], *, dtype: str = "auto", device: str = "cpu", offload: bool | None = None
) -> Loaded:
    """Load a checkpoint through stock transformers; `dtype` is a torch dtype's name or "auto".

    A model that does not fit into the free memory of `device` runs with accelerate's offload: its weights stay
    on the disk, in the checkpoint itself. `offload` decides that by hand. Raises `Refusal` for a folder that
    is not a checkpoint, a device that is not there, or a quantisation library that is absent.
    """
    import transformers

    path = open_files(path).download()
    config = _config(path)
    _check_library(config)
    names = config.get("architectures") or []
    kind = getattr(transformers, names[0], None) if names else transformers.AutoModelForCausalLM
    if kind is None:
        raise Refusal(f"{path}/config.json: architecture {names[0]!r} is unknown to transformers")
    check_device(device)
    places = _device_map(path, dtype, device, offload)
    if places != {"": device} and config.get("quantization_config"):
        raise Refusal(f"{path}: does not fit into memory, and quantised weights can't be offloaded to the disk")
    scratch = tempfile.mkdtemp(prefix="reattend-offload-")  # for weights that the loader has to convert first
    try:
        model = kind.from_pretrained(path, dtype=dtype, device_map=places, offload_folder=scratch).eval()
    except (OSError, ValueError, RuntimeError) as error:
        shutil.rmtree(scratch)
        raise Failure(f"{path}: transformers can't load it: {first_line(error)}") from error
    weakref.finalize(model, shutil.rmtree, scratch, ignore_errors=True)
    if dtype != "auto":
        _cast(model, dtype)
    return Loaded(model, load_tokenizer(path))


def check_device(device: str) -> None:
    """Refuse a device that torch can't use here."""
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise Refusal(f"device {device!r} can't be used here: {first_line(error)}") from error


def _device_map(path: str | os.PathLike[str], dtype: str, device: str, offload: bool | None) -> Any:
    """Return where from_pretrained is to put weights: on `device` where they fit, else partly on the disk."""
    if offload is None:
        offload = _load_bytes(path, dtype) > _SHARE_OF_MEMORY * _free_bytes(device)
    if not offload:
        return {"": device}
    return {"": "disk"} if device == "cpu" else "auto"


def _load_bytes(path: str | os.PathLike[str], dtype: str) -> int:
    """Bytes of a checkpoint's tensors once they are loaded in `dtype`."""
    import torch

    specs = [stored.spec for stored in open_checkpoint(path).tensors.values()]
    if dtype == "auto":
        return sum(max(spec.nbytes, 2 * spec.numel) for spec in specs)  # codes may be unpacked to 16 bit
    return int(sum(spec.numel for spec in specs) * getattr(torch, dtype).itemsize)


def _free_bytes(device: str) -> int:
    import psutil
    import torch

    kind = torch.device(device)
    return int(torch.cuda.mem_get_info(kind)[0] if kind.type == "cuda" else psutil.virtual_memory().available)


def _cast(model: Any, dtype: str) -> None:
    """Cast what the loader of bitsandbytes leaves in its stored dtype; codes stay as they are."""
    import torch

    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.device.type != "meta":
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
