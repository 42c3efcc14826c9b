"""The float slices of static outlier columns: files beside the checkpoint, which stock loaders do not look at.

They lie in a folder of their own, as engines take every safetensors file beside `config.json` for weights.
"""

import math
from collections.abc import Collection, Container

import torch
from safetensors.torch import save
from torch import Tensor

from reattend.checkpoint.index import OUTLIERS
from reattend.families.source import Source
from reattend.kernels.int8_linear import Outliers
from reattend.quantize.int8.outliers import allocate, ascending
from reattend.transform import Statistics


def choose_columns(
    source: Source, statistics: Statistics, modules: Collection[str], share: float
) -> dict[str, Tensor]:
    """Return the number of columns (scalars) of every input of `modules` (full names), named `LAYER.LINEAR`.

    Together they add at most this share of the modules' weights.
    """
    curves: dict[str, Tensor] = {}
    costs: dict[str, int] = {}
    for layer in range(source.num_layers):
        learned, prefix = statistics[str(layer)], source.layer_prefix(layer)
        for first in _firsts(learned):
            names = [name for name in _sharers(learned, first) if prefix + name in modules]
            if names:
                curves[f"{layer}.{first}"] = learned[f"{first}.curve"]
                costs[f"{layer}.{first}"] = sum(len(learned[f"{name}.slice"]) for name in names)
    budget = int(share * sum(math.prod(source.linear_shapes[module]) for module in modules))
    return {name: torch.tensor(count) for name, count in allocate(curves, costs, budget).items()}


def layer_file(prefix: str, layer: int, statistics: Statistics, modules: Container[str]) -> tuple[str, bytes]:
    """Return the name and bytes of a layer's file: `MODULE.outlier_columns` (N,) and `.outlier_weight` (O, N).

    Without the linears that are not among `modules` (full names).
    """
    tensors: dict[str, Tensor] = {}
    for name, outliers in chosen_outliers(layer, statistics).items():
        if f"{prefix}{name}" in modules:
            tensors[f"{prefix}{name}.outlier_columns"] = outliers.columns.clone()
            tensors[f"{prefix}{name}.outlier_weight"] = outliers.weight
    return f"{OUTLIERS}/layer-{layer:05d}.safetensors", save(tensors, {"format": "pt"})


def chosen_outliers(layer: int, statistics: Statistics) -> dict[str, Outliers]:
    """Return the columns and float slices of a layer's linears that have any, by name within the layer."""
    learned, counts = statistics[str(layer)], statistics["columns"]
    chosen: dict[str, Outliers] = {}
    for first in _firsts(learned):
        count, names = int(counts.get(f"{layer}.{first}", 0)), _sharers(learned, first)
        slices = [learned[f"{name}.slice"][:, :count] for name in names]
        columns, slices = ascending(learned[f"{first}.columns"][:count], slices)
        if count:
            chosen |= {name: Outliers(columns, piece) for name, piece in zip(names, slices, strict=True)}
    return chosen


def _firsts(learned: dict[str, Tensor]) -> list[str]:
    """The linears that their inputs are named after."""
    return sorted(name.removesuffix(".curve") for name in learned if name.endswith(".curve"))


def _sharers(learned: dict[str, Tensor], first: str) -> list[str]:
    """The linears that take the same input as `first`: those with its number, in the order of their names."""
    own = int(learned[f"{first}.input"])
    inputs = {name.removesuffix(".input"): int(v) for name, v in learned.items() if name.endswith(".input")}
    return sorted(name for name, number in inputs.items() if number == own)
