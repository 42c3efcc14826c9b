"""Dictionary projections made dense once, at load: the speed of the source for its memory."""

from typing import Any

from reattend.modeling.portable.dictionary_reattend import ReattendFactored


def materialize(model: Any) -> None:
    """Put linear layers in the place of a portable model's factored projections, and drop what layers shared.

    The model is then an ordinary one, also when it is saved.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, ReattendFactored):
                setattr(module, name, child.dense())
    base = getattr(model, model.base_model_prefix, model)
    base.dictionary = None
    model.config.weight_dictionary = None
