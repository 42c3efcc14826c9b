"""load(): a checkpoint, converted or not, as a running model with its tokenizer."""

import json
import os
import shutil
import tempfile
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple

from reattend.checkpoint.files import open_files
from reattend.checkpoint.index import Checkpoint, open_checkpoint
from reattend.errors import Failure, ReattendError, Refusal
from reattend.families.attention_kinds import KEY, declared_kinds
from reattend.families.source import numbers
from reattend.modeling.architecture import model_class, model_config, told
from reattend.modeling.dtypes import DTYPES
from reattend.modeling.int8_loading import load_int8, runs_on_kernels

_LIBRARIES = {"compressed-tensors": "compressed_tensors", "bitsandbytes": "bitsandbytes"}
_INTEGERS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
_ON_DISK = {"": "disk"}
_OFFLOADING = ("auto", _ON_DISK)  # the device maps with which weights may stay on the disk
_SHARE_OF_MEMORY = 0.8  # of what is free: activations and logits need the rest


class Loaded(NamedTuple):
    """A model in evaluation mode and its tokenizer (None where the checkpoint has none)."""

    model: Any
    tokenizer: Any


def load(
    path: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    device: str = "cpu",
    offload: bool | None = None,
    runtime: Literal["auto", "stock"] = "auto",
    int8_head: bool = False,
    simulate: bool = False,
    dictionary: Literal["dense", "factors"] = "dense",
) -> Loaded:
    """Load a checkpoint; `dtype` is a torch dtype's name or "auto".

    `runtime="auto"` runs int8 checkpoints on our kernels, MLA with absorbed decode
    (`modeling/latent_attention.py`), dictionary projections made dense (or, with `dictionary="factors"`, on
    `kernels/dictionary_linear`: the memory of the file, and slower), and attention through ours
    (`modeling/attention_backend.py`) on a CPU or where the config chose quantised layers; everything else through
    stock transformers, and "stock" takes that for all.
    A model whose weights stay on the disk runs stock too, but for attention. `int8_head` also quantises the output
    embedding of an int8 model on our kernels (W8A16; a copy where it is tied): on a CPU it is a third or more of
    decoding.
    `simulate` computes int8 attention as a GPU would where there is none, slowly and without gradients (call the
    model under `torch.no_grad()`), to measure it; by itself a CPU runs exact attention in its place, and says so.
    A model that does not fit into the free memory of `device` runs with accelerate's offload: its weights stay
    on the disk, in the checkpoint itself. `offload` decides that by hand. Raises `Refusal` for a folder that
    is not a checkpoint, a device that is not there, a quantisation library that is absent, `int8_head` for
    another model, or `simulate` with stock transformers.
    """
    if runtime not in ("auto", "stock") or (simulate and runtime == "stock"):
        raise Refusal(f"runtime {runtime!r}: expected auto or stock, and auto with simulate")
    if dictionary not in ("dense", "factors"):
        raise Refusal(f"dictionary {dictionary!r}: expected dense or factors")
    path = open_files(path).download()
    checkpoint = open_checkpoint(path)
    _check_config(path, checkpoint)
    check_dtype(dtype)
    check_device(device)
    kind = model_class(path, checkpoint.config)
    if runtime == "auto" and not offload and runs_on_kernels(checkpoint.config):
        model = _on_kernels(path, checkpoint, dtype=dtype, device=device, int8_head=int8_head)
        _take_over(path, model, checkpoint, simulate, dictionary)
        return Loaded(model, load_tokenizer(path))
    if int8_head:
        raise Refusal(f"{path}: int8_head: only int8 checkpoints that run on the bundled kernels take it")
    _check_library(path, checkpoint.config)
    model = _stock(path, kind, dtype, _placement(checkpoint, dtype, str(device), offload))
    if dtype != "auto":
        _cast(model, dtype)
    if runtime == "auto":
        _take_over(path, model, checkpoint, simulate, dictionary)
    return Loaded(model, load_tokenizer(path))


def _stock(path: Path, kind: Any, dtype: str, places: dict[str, Any]) -> Any:
    """Load through transformers; offloaded weights that it has to convert first lie in a scratch folder."""
    with ExitStack() as on_failure:
        if places["device_map"] in _OFFLOADING:
            places["offload_folder"] = tempfile.mkdtemp(prefix="reattend-offload-")
            on_failure.callback(shutil.rmtree, places["offload_folder"], ignore_errors=True)
        try:
            model = kind.from_pretrained(path, dtype=dtype, **places).eval()
        except Exception as error:
            raise Failure(f"{path}: transformers can't load it: {told(error)}") from error
        weakref.finalize(model, on_failure.pop_all().close)
    return model


def _take_over(path: Path, model: Any, checkpoint: Checkpoint, simulate: bool, dictionary: str) -> None:
    """Run attention on our kernels, MLA absorbed, factors made dense or on ours: not with weights on the disk."""
    if getattr(model.config, "weight_dictionary", None) is not None and not hasattr(model, "_hf_hook"):
        from reattend.modeling.factored import materialize, run_factored

        run_factored(model) if dictionary == "factors" else materialize(model)
    choose_attention(path, model, checkpoint.config, simulate=simulate)
    latent = model.config.model_type == "deepseek_v3" or getattr(model.config, "latent_attention", None) is not None
    if latent and not hasattr(model, "_hf_hook"):
        from reattend.modeling.latent_attention import run_absorbed  # imports the model's code

        run_absorbed(model)


def choose_attention(path: Path, model: Any, config: dict[str, Any], *, simulate: bool = False) -> None:
    """Switch a model that runs sdpa to our attention: where its config declares quantised layers, and on a CPU.

    On a GPU exact attention stays torch's, which is as fast, but for clipped softmax and decode of shared attention,
    which torch has not. Raises `Refusal` for a declaration that nothing can run.
    """
    declared = declared_kinds(config, getattr(model.config, "num_hidden_layers", 0), f"{path}/config.json")
    on_gpu = any(parameter.is_cuda for parameter in model.parameters())
    if declared is None and on_gpu and not (config.get("clipped_softmax") or config.get("attention_sharing")):
        return
    now = model.config._attn_implementation
    if not model._supports_attention_backend or now != "sdpa":
        if declared is not None:
            raise Refusal(
                f"{path}/config.json: {KEY} can't be honoured: {type(model).__name__} runs attention {now!r}"
            )
        return
    from reattend.modeling.attention_backend import EXACT, INT8, SIMULATED, register_attention

    register_attention()
    int8 = SIMULATED if simulate and not on_gpu else INT8
    model.set_attn_implementation(EXACT if declared is None else int8)


def _on_kernels(path: Path, checkpoint: Checkpoint, **options: Any) -> Any:
    if checkpoint.nbytes > _SHARE_OF_MEMORY * free_bytes(options["device"]):
        raise Refusal(f"{path}: does not fit into memory, and quantised weights can't be offloaded to the disk")
    try:
        return load_int8(path, **options)
    except ReattendError:
        raise
    except Exception as error:
        raise Failure(f"{path}: can't be loaded: {told(error)}") from error


def check_device(device: str) -> None:
    """Refuse a device that torch can't use here, or that holds no numbers."""
    import torch

    expected = "expected cpu, cuda or cuda:0"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise Refusal(f"device {device!r}: no such device; {expected}") from error
    if found.type == "meta" or (found.type == "cpu" and found.index is not None):
        raise Refusal(f"device {device!r}: can't be computed on; {expected}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise Refusal(f"device {device!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    try:
        torch.empty(1, device=found)
    except Exception as error:  # each backend has its own errors
        raise Refusal(f"device {device!r}: can't be used here; {expected}") from error


def check_dtype(dtype: str) -> None:
    """Refuse a dtype that no model is loaded in."""
    if dtype not in DTYPES:
        raise Refusal(f"dtype {dtype!r}: expected {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")


def _placement(checkpoint: Checkpoint, dtype: str, device: str, offload: bool | None) -> dict[str, Any]:
    """Return where from_pretrained is to put weights: on `device` where they fit, else partly on the disk."""
    asked = offload
    if offload is None:
        offload = _load_bytes(checkpoint, dtype) > _SHARE_OF_MEMORY * free_bytes(device)
    if not offload:
        return {"device_map": {"": device}}
    if checkpoint.config.get("quantization_config"):
        reason = "quantised weights can't be offloaded to the disk"
        raise Refusal(f"{checkpoint.files.name}: {reason if asked else f'does not fit into memory, and {reason}'}")
    if device == "cpu":
        return {"device_map": _ON_DISK}
    return {"device_map": "auto", "max_memory": _room(device)}


def _room(device: str) -> dict[int | str, int]:
    """Return the bytes that weights may take on a device and on the CPU: no other device is used."""
    import torch

    kind = torch.device(device)
    key: int | str = kind.type
    if kind.type == "cuda":
        key = torch.cuda.current_device() if kind.index is None else kind.index
    return {name: int(_SHARE_OF_MEMORY * free_bytes(str(on))) for name, on in ((key, device), ("cpu", "cpu"))}


def _load_bytes(checkpoint: Checkpoint, dtype: str) -> int:
    """Bytes of a checkpoint's tensors once they are loaded in `dtype`."""
    import torch

    total = 0
    for stored in checkpoint.tensors.values():
        spec = stored.spec
        held = numbers(spec, checkpoint.config)
        if dtype == "auto" or not held:  # scales stay as they are; codes may be unpacked to 16 bit
            total += max(spec.nbytes, 2 * held)
        else:
            total += held * getattr(torch, dtype).itemsize
    return total


def free_bytes(device: str) -> int:
    """Return the bytes that are free on a device, for the CPU those that the system can give."""
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
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, **_config_of_code(Path(path)))
    except Exception as error:
        raise Failure(f"{path}: its tokenizer can't be loaded: {told(error)}") from error


def _config_of_code(path: Path) -> dict[str, Any]:
    """Return the config of a folder with code of its own, which AutoTokenizer would want to run for it."""
    config = json.loads((path / "config.json").read_text("utf-8"))
    return {"config": model_config(path, config)} if config.get("auto_map") else {}


def _check_config(path: Path, checkpoint: Checkpoint) -> None:
    """Refuse what transformers would take in another sense than it has, or stumble over."""
    config = checkpoint.config
    for key, kind in (("architectures", list), ("quantization_config", dict)):
        if not isinstance(config.get(key) or kind(), kind):
            raise Refusal(f"{path}/config.json: {key} is not a {kind.__name__}")
    for name in config.get("architectures") or []:
        if not isinstance(name, str):
            raise Refusal(f"{path}/config.json: architectures holds {name!r}, expected names")
    quantization = config.get("quantization_config")
    if quantization:
        _method(path, quantization)
        return
    for stored in checkpoint.tensors.values():
        spec = stored.spec
        if spec.name.endswith(".weight") and len(spec.shape) == 2 and spec.dtype in _INTEGERS:
            codes = f"tensor {spec.name!r} is stored as {spec.dtype}"
            raise Refusal(f"{path}/{stored.file}: {codes}, and config.json has no quantization_config that reads it")


def _method(path: Path, quantization: dict[str, Any]) -> str:
    method = quantization.get("quant_method")
    if method is None and (quantization.get("load_in_8bit") or quantization.get("load_in_4bit")):
        method = "bitsandbytes"
    library = _LIBRARIES.get(str(method))
    if library is None:
        known = " and ".join(_LIBRARIES)
        raise Refusal(f"{path}/config.json: quant_method {method!r} is not supported; {known} are")
    return str(method)


def _check_library(path: Path, config: dict[str, Any]) -> None:
    from importlib.util import find_spec

    quantization = config.get("quantization_config")
    method = _method(path, quantization) if quantization else None
    if method and find_spec(_LIBRARIES[method]) is None:
        raise Refusal(f"{method} is not installed, and the checkpoint needs it: pip install {method}")
