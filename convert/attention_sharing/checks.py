"""What the steps that share or drop attention refuse."""

from reattend.errors import Refusal
from reattend.families.source import Source

_REFUSED = {
    "latent": "latent attention", "gates": "gated attention", "clipped_softmax": "clipped softmax",
    "attention_sharing": "attention that is shared already", "attention_drop": "layers without attention already",
    "weight_dictionary": "weights that are stored as factors",
}  # fmt: skip


def check_source(source: Source, step: str) -> None:
    """Refuse what has no queries and keys to share, and what would have to be mapped with them."""
    family = source.family
    if "self_attn.q_proj" not in family.linears or family.model_type in ("opt", "reattend_opt"):
        raise Refusal(f"{step}: {family.model_type}: expected a model of the Llama family")
    for feature, what in _REFUSED.items():
        if feature in family.features:
            raise Refusal(f"{step}: the source has {what}; apply this step first")
    if source.config.get("quantization_config"):
        raise Refusal(f"{step}: the source is quantised; convert first, quantise after")
    if source.config.get("int8_attention") is not None:
        raise Refusal(f"{step}: the source has quantised attention; convert first, quantise after")


def kinds_of(source: Source) -> list[str]:
    """Return what each layer attends to: two layers of different kinds can't share."""
    from reattend.convert.portable.form import portable_config

    kinds: list[str] = portable_config(source, {})["layer_types"]
    return kinds
