"""The portable models by name: their classes, and the code that a checkpoint of theirs brings along."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from reattend.errors import Refusal

FORMAT = 1  # that of `configuration_reattend`, which has to stand alone
PACKAGE = "reattend.modeling.portable"
_SHARED = ("configuration_reattend.py", "attention_reattend.py")


@dataclass(frozen=True)
class PortableClasses:
    """Where the classes of a portable model are, by their names in `module`; `auto` is what loads `headed`.

    `beside` are further files that the module imports.
    """

    module: str
    config: str
    base: str
    headed: str
    auto: str = "AutoModelForCausalLM"
    beside: tuple[str, ...] = ()

    @property
    def auto_map(self) -> dict[str, str]:
        """The config's key that transformers finds the classes by."""
        return {
            "AutoConfig": f"configuration_reattend.{self.config}",
            "AutoModel": f"{self.module}.{self.base}",
            self.auto: f"{self.module}.{self.headed}",
        }

    def code(self) -> Iterator[tuple[str, bytes]]:
        """Yield (file name, content) of the code."""
        for name in (*_SHARED, *self.beside, f"{self.module}.py"):
            yield name, files(PACKAGE).joinpath(name).read_bytes()


PORTABLE = {
    "reattend": PortableClasses(
        "modeling_reattend", "ReattendConfig", "ReattendModel", "ReattendForCausalLM",
        beside=("latent_reattend.py", "sharing_reattend.py", "dictionary_reattend.py"),
    ),
    "reattend_opt": PortableClasses(
        "modeling_reattend_opt", "ReattendOPTConfig", "ReattendOPTModel", "ReattendOPTForCausalLM"
    ),
    "reattend_bert": PortableClasses(
        "modeling_reattend_bert", "ReattendBertConfig", "ReattendBertModel", "ReattendBertForMaskedLM",
        auto="AutoModelForMaskedLM",
    ),
}  # fmt: skip


def engine_limits(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the engines that can't serve a portable model, and why, in whatever format its weights are."""
    if config.get("model_type") not in PORTABLE:
        return {}
    if config.get("latent_attention") is not None:
        caches = "no: its transformers backend caches keys and values of head_dim numbers, not latents"
        return dict.fromkeys(("vllm", "sglang"), caches)
    if config.get("attention_drop"):
        return {"vllm": "no: its transformers backend wants attention in every layer"}
    return {}


def portable_classes(config: Mapping[str, Any]) -> PortableClasses | None:
    """Return the classes of a portable model, or None for another model.

    Raises `Refusal` for a format that this version doesn't know, and for an `auto_map` or `architectures` that
    names other classes.
    """
    name = config.get("model_type")
    classes = PORTABLE.get(name) if isinstance(name, str) else None
    if classes is None:
        return None
    if config.get("reattend_format") != FORMAT:
        found = config.get("reattend_format")
        raise Refusal(f"config.json: reattend_format is {found!r}, and this version of reattend knows {FORMAT}")
    if config.get("auto_map") != classes.auto_map:
        raise Refusal(f"config.json: auto_map is not that of {name}; write the model anew from its source")
    if config.get("architectures") not in ([classes.headed], [classes.base]):
        raise Refusal(f"config.json: architectures: expected {classes.headed} or {classes.base}")
    return classes
