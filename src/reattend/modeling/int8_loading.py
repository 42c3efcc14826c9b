"""load_int8(): an int8 checkpoint on its own codes and scales; nothing is decompressed or quantised again.

`quantize/int8/formats.py` says which formats. Static outlier columns come from the files that the step put beside.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reattend.checkpoint.files import LocalFolder
from reattend.checkpoint.index import Checkpoint, open_checkpoint
from reattend.checkpoint.tensors import ShardReader
from reattend.errors import Failure, Refusal
from reattend.kernels.int8_linear import Outliers
from reattend.kernels.int8_linear.reference import quantize_rows
from reattend.modeling.architecture import model_class, model_config
from reattend.modeling.int8 import Int8Linear, fuse_linears, replace_linears
from reattend.modeling.int8_outliers import read_outliers
from reattend.quantize.int8.declared import declared_outliers, layout_of, scheme
from reattend.quantize.int8.formats import int8_modules, read_codes

_PARTS = ("weight", "weight_packed", "weight_shape", "weight_scale", "SCB", "weight_format", "bias")


def load_int8(
    path: str | os.PathLike[str], *, dtype: str = "auto", device: str = "cpu", fuse: bool = True,
    int8_head: bool = False, outliers: Mapping[str, Outliers] | None = None,
) -> Any:  # fmt: skip
    """Return the model of an int8 checkpoint in evaluation mode, its linear layers on our kernels.

    `dtype` is what everything but codes and scales is held and computed in ("auto": the config's); `fuse` joins
    q/k/v and gate/up; `int8_head` also quantises the head (W8A16, a copy where it is tied); `outliers` maps
    module names to static outlier columns (default: those that the checkpoint brings along). Raises `Refusal` for
    a checkpoint that is not int8 in a format known here, and `Failure` where tensors and model do not match.
    """
    checkpoint = open_checkpoint(path)
    if not isinstance(checkpoint.files, LocalFolder):
        raise Refusal(f"{path}: not a folder on this machine")
    options = scheme(checkpoint.config)
    model = _empty_model(checkpoint.config, Path(path), dtype)
    reader = ShardReader(checkpoint.files.path)
    try:
        outliers = read_outliers(checkpoint) if outliers is None else outliers
        layers = dict(_layers(checkpoint, reader, options, outliers))
        unknown = [name for name in outliers if name not in layers]
        if unknown:
            raise Refusal(f"outliers: {unknown[0]!r} is no int8 layer of {path}")
        replace_linears(model, layers)
        _fill(model, checkpoint, reader, layers)
    finally:
        reader.close()
    if int8_head:
        _quantize_head(model)
    if fuse:
        fuse_linears(model)
    return model.to(device).eval()


def runs_on_kernels(config: Mapping[str, Any]) -> bool:
    """Whether a config declares int8 in a format that `load_int8` runs."""
    if not config.get("quantization_config"):
        return False
    declared_outliers(config)  # our own key: what it says wrongly is no other format
    try:
        scheme(config)
    except Refusal:
        declared = config["quantization_config"]
        if isinstance(declared, dict) and declared.get("load_in_8bit") is True:
            raise  # int8, and wrongly described: no other format that stock could run
        return False
    return True


def _empty_model(config: Mapping[str, Any], path: Path, dtype: str) -> nn.Module:
    from accelerate import init_empty_weights

    stock = model_config(path, dict(config))
    if hasattr(stock, "quantization_config"):
        del stock.quantization_config
    if not config.get("architectures"):
        raise Refusal(f"{path}/config.json: architectures names no class of transformers")
    chosen = getattr(torch, dtype) if dtype != "auto" else stock.dtype or torch.float32
    if chosen not in (torch.float32, torch.float16, torch.bfloat16):
        asked = f"{path}/config.json: dtype is" if dtype == "auto" else "dtype:"
        raise Refusal(
            f"{asked} {str(chosen).removeprefix('torch.')}; int8 layers compute in float32, float16, bfloat16"
        )
    with init_empty_weights(include_buffers=False):
        model: nn.Module = model_class(path, dict(config))._from_config(stock, dtype=chosen)
    return model


def _layers(
    checkpoint: Checkpoint, reader: ShardReader, options: Mapping[str, Any], outliers: Mapping[str, Outliers]
) -> Iterator[tuple[str, Int8Linear]]:
    """Yield (module name, layer) of every int8 weight."""
    stored = checkpoint.tensors

    def read(name: str) -> Tensor:
        if name not in stored:
            raise Refusal(f"tensor {name!r} is missing")
        return reader.read(stored[name])

    for module in int8_modules(tensor.spec for tensor in stored.values()):
        codes, scale = read_codes(layout_of(checkpoint.config), module, stored, read)
        bias = read(f"{module}.bias") if f"{module}.bias" in stored else None
        yield module, Int8Linear(codes, scale, bias, outliers=outliers.get(module), **options)


def _fill(model: nn.Module, checkpoint: Checkpoint, reader: ShardReader, layers: Mapping[str, Int8Linear]) -> None:
    """Load every tensor that belongs to no int8 layer; then nothing of the model may be left empty."""
    own = model.state_dict(keep_vars=True)
    taken = {f"{module}.{part}" for module in layers for part in _PARTS}
    values = {}
    for name, tensor in checkpoint.tensors.items():
        if name in taken:
            continue
        if name not in own:
            raise Failure(f"tensor {name!r} is not one of {type(model).__name__}")
        values[name] = nn.Parameter(reader.read(tensor).to(own[name].dtype), requires_grad=False)
    model.load_state_dict(values, strict=False, assign=True)
    model.tie_weights()  # type: ignore[operator]
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_meta:
            raise Failure(f"tensor {name!r} is not in the checkpoint")


def _quantize_head(model: Any) -> None:
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise Refusal(f"{type(model).__name__} has no plain linear head to quantise")
    codes, scale = quantize_rows(head.weight.detach())
    model.set_output_embeddings(Int8Linear(codes, scale, head.bias, activations="none"))
