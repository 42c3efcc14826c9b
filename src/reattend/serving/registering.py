"""The portable decoders, made known to transformers' Auto classes by this package's own code."""

from collections.abc import Iterator
from importlib import import_module
from typing import Any

from reattend.families.portable import PACKAGE, PORTABLE, PortableClasses


def decoders() -> Iterator[tuple[str, PortableClasses]]:
    """Yield (model_type, classes) of the portable models that generate text."""
    return ((name, classes) for name, classes in PORTABLE.items() if classes.auto == "AutoModelForCausalLM")


def register_portable() -> list[str]:
    """Register the decoders with AutoConfig, AutoModel and AutoModelForCausalLM; return their architectures.

    What is installed then runs in the place of the code beside the weights, and without `trust_remote_code`. Calling
    it again changes nothing.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    architectures = []
    for name, classes in decoders():
        config: Any = getattr(import_module(f"{PACKAGE}.configuration_reattend"), classes.config)
        module = import_module(f"{PACKAGE}.{classes.module}")
        AutoConfig.register(name, config, exist_ok=True)
        AutoModel.register(config, getattr(module, classes.base), exist_ok=True)
        AutoModelForCausalLM.register(config, getattr(module, classes.headed), exist_ok=True)
        architectures.append(classes.headed)
    return architectures
