"""What the int8 step refuses, from headers and config."""

import fnmatch
from collections.abc import Container, Iterable

from reattend.errors import Refusal
from reattend.families.source import Source
from reattend.quantize.int8.migration import layer_tensors

CALIBRATED = ("F32", "F16", "BF16")
FLOATS = ("F64", *CALIBRATED, "F8_E4M3", "F8_E5M2")


def check_source(source: Source) -> None:
    """Refuse what neither format can hold."""
    if source.config.get("quantization_config"):
        raise Refusal("config.json: quantization_config: the source is quantised already")
    if "int8_outliers" in source.config:
        raise Refusal("config.json: int8_outliers: belongs to an int8 checkpoint, which this is not; remove the key")
    if "conv1d" in source.family.features:
        raise Refusal(f"int8: {source.family.model_type} stores Conv1D layers, which neither format covers")
    if "experts" in source.family.features:
        raise Refusal(
            f"int8: {source.family.model_type} stacks its experts, and stock transformers can't load the mix"
        )


def check_selectors(patterns: Iterable[str], source: Source) -> None:
    """Refuse a selector that matches nothing."""
    modules = source.linear_shapes
    for pattern in patterns:
        if not fnmatch.filter(modules, pattern):
            raise Refusal(f"int8: selector {pattern!r} matches no linear layer, as {next(iter(modules))}")


def check_dtypes(names: Iterable[str], source: Source, allowed: Container[str], reason: str) -> None:
    """Refuse a tensor of another dtype."""
    for name in names:
        if source.tensors[name].dtype not in allowed:
            raise Refusal(f"int8: tensor {name!r} is {source.tensors[name].dtype}: {reason}")


def check_smoothing(source: Source) -> None:
    """Refuse a family without places that smoothing could use, and a layer without the weights to scale."""
    family = source.family
    if not family.feeds:
        raise Refusal(f"int8: outliers: {family.model_type} has no place that smoothing could use")
    post_norm = source.get("do_layer_norm_before") is False
    if post_norm or source.get("activation_function") not in (None, "relu"):
        raise Refusal("int8: outliers: OPT can be smoothed with do_layer_norm_before and a ReLU only")
    for prefix in (source.layer_prefix(layer) for layer in range(source.num_layers)):
        for feed in family.feeds:
            if f"{prefix}{feed.producer}.weight" not in source.tensors:
                raise Refusal(f"int8: outliers: {prefix}{feed.producer} has no weight that could be scaled")
        check_dtypes(layer_tensors(source, prefix), source, CALIBRATED, "scaled in F32, F16 and BF16 only")
