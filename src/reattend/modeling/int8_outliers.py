"""Static outlier columns beside an int8 checkpoint: checked from headers, and read."""

from pathlib import Path

import torch
from torch import Tensor

from reattend.checkpoint.header import TensorSpec, read_header
from reattend.checkpoint.index import OUTLIERS, Checkpoint
from reattend.errors import Refusal
from reattend.families.source import Source, source_of
from reattend.kernels.int8_linear import Outliers
from reattend.quantize.int8.declared import declared_outliers

_FLOATS = ("F32", "F16", "BF16")


def check_outliers(checkpoint: Checkpoint, source: Source) -> None:
    """Refuse side files that are missing, damaged, or do not fit the model, from their headers; none may be there."""
    for file in _files(checkpoint, source):
        _specs(checkpoint, source, file)


def read_outliers(checkpoint: Checkpoint) -> dict[str, Outliers]:
    """Return the static outlier columns of a local checkpoint by module; usually none. Raises as `check_outliers`."""
    from safetensors.torch import load_file

    source = source_of(checkpoint)
    found: dict[str, Outliers] = {}
    for file in _files(checkpoint, source):
        specs = _specs(checkpoint, source, file)
        tensors = load_file(Path(checkpoint.files.name) / file)
        for module in {name.rpartition(".")[0] for name in specs}:
            columns = tensors[f"{module}.outlier_columns"]
            _check_columns(columns, source.linear_shapes[module][1], f"{checkpoint.files.name}/{file}", module)
            found[module] = Outliers(columns, tensors[f"{module}.outlier_weight"])
    return found


def _files(checkpoint: Checkpoint, source: Source) -> list[str]:
    """The files that there must be, one per layer."""
    if declared_outliers(checkpoint.config)[0] != "static":
        return []
    expected = [f"{OUTLIERS}/layer-{layer:05d}.safetensors" for layer in range(source.num_layers)]
    for file in expected:
        if file not in checkpoint.sizes:
            raise Refusal(
                f"{checkpoint.files.name}/{file}: is missing, and config.json declares static columns (int8_outliers)"
            )
    for file in checkpoint.sidecars:
        if file.startswith(f"{OUTLIERS}/") and file not in expected:
            raise Refusal(f"{checkpoint.files.name}/{file}: belongs to no layer of the model")
    return expected


def _specs(checkpoint: Checkpoint, source: Source, file: str) -> dict[str, TensorSpec]:
    files, where = checkpoint.files, f"{checkpoint.files.name}/{file}"
    header = read_header(lambda start, length: files.read(file, start, length), checkpoint.sizes[file], where)
    specs = {stored.spec.name: stored.spec for stored in header.tensors}
    prefix = source.layer_prefix(int(file[-len("00000.safetensors") :].partition(".")[0]))
    for name, spec in specs.items():
        module, _, kind = name.rpartition(".")
        if module not in source.linear_shapes or not module.startswith(prefix):
            raise Refusal(f"{where}: tensor {name!r} belongs to no linear of the layer")
        partner = {"outlier_columns": "outlier_weight", "outlier_weight": "outlier_columns"}.get(kind)
        if f"{module}.{partner}" not in specs:
            raise Refusal(f"{where}: tensor {name!r} has no partner")
        _check_spec(spec, specs[f"{module}.{partner}"], source.linear_shapes[module], where)
    return specs


def _check_spec(spec: TensorSpec, partner: TensorSpec, shape: tuple[int, int], where: str) -> None:
    """Columns (N,) and weight (O, N)."""
    if spec.name.endswith("columns"):
        good = spec.dtype == "I64" and len(spec.shape) == 1
        wanted = "I64 [N]"
    else:
        good = spec.dtype in _FLOATS and spec.shape == (shape[0], *partner.shape)
        wanted = f"a float [{shape[0]}, N], N as its columns"
    if not good:
        raise Refusal(f"{where}: tensor {spec.name!r} is {spec.dtype} {list(spec.shape)}, expected {wanted}")


def _check_columns(columns_N: Tensor, inputs: int, where: str, module: str) -> None:
    inside = len(columns_N) == 0 or (int(columns_N.min()) >= 0 and int(columns_N.max()) < inputs)
    if not inside or bool((torch.diff(columns_N) <= 0).any()):
        name = f"{module}.outlier_columns"
        raise Refusal(f"{where}: tensor {name!r} is not ascending within the {inputs} inputs of its linear")
