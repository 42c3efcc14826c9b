"""What the step `dictionary` refuses."""

from reattend.convert.dictionary.moments import PROJECTIONS
from reattend.errors import Refusal
from reattend.families.source import Source

_FLOATS = ("F64", "F32", "F16", "BF16")


def check_source(source: Source) -> None:
    """Refuse a source without separate projections in floating point."""
    family = source.family
    if any(f"self_attn.{name}" not in family.linears for name in PROJECTIONS):
        raise Refusal(f"dictionary: {family.model_type} has no separate q_proj, k_proj, v_proj and o_proj")
    if "latent" in family.features:
        raise Refusal("dictionary: the source has latent attention, whose projections are low-rank already")
    if source.config.get("quantization_config"):
        raise Refusal("dictionary: the source is quantised; convert first, quantise after")
    for layer in range(source.num_layers):
        for name in PROJECTIONS:
            tensor = f"{source.layer_prefix(layer)}self_attn.{name}.weight"
            if tensor in source.tensors and source.tensors[tensor].dtype not in _FLOATS:
                raise Refusal(f"dictionary: tensor {tensor!r} is {source.tensors[tensor].dtype}, not a float")
