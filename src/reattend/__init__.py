"""Post-training surgery on transformer checkpoints. The names below load their module on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reattend.errors import Failure, Refusal
    from reattend.evaluation.perplexity import evaluate
    from reattend.hub.pushing import push
    from reattend.modeling.attention_backend import register_attention
    from reattend.modeling.loading import load
    from reattend.pipeline.healing import heal
    from reattend.pipeline.planning import plan
    from reattend.pipeline.sensitivity import sensitivity
    from reattend.pipeline.verification import verify
    from reattend.reporting.applying import apply
    from reattend.reporting.measure import report

__version__ = "0.1.0"
__all__ = [
    "Failure",
    "Refusal",
    "apply",
    "evaluate",
    "heal",
    "load",
    "plan",
    "push",
    "register_attention",
    "report",
    "sensitivity",
    "verify",
]

# Importing torch takes seconds, and `reattend --help` must not: so a name is bound when it is asked for.
_HOMES = {
    "Failure": "reattend.errors",
    "Refusal": "reattend.errors",
    "apply": "reattend.reporting.applying",
    "heal": "reattend.pipeline.healing",
    "evaluate": "reattend.evaluation.perplexity",
    "load": "reattend.modeling.loading",
    "register_attention": "reattend.modeling.attention_backend",
    "plan": "reattend.pipeline.planning",
    "push": "reattend.hub.pushing",
    "report": "reattend.reporting.measure",
    "sensitivity": "reattend.pipeline.sensitivity",
    "verify": "reattend.pipeline.verification",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'reattend' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
