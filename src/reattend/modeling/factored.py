"""Dictionary projections as they run: made dense once, at load, or as factors on our kernel.

Dense has the speed of the source for its memory; as factors the model takes as much memory as its file.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

from reattend.kernels.dictionary_linear import dictionary_linear
from reattend.modeling.portable.dictionary_reattend import ReattendFactored


class FactoredLinear(nn.Module):
    """A portable model's factored projection on `kernels/dictionary_linear`; parameters are named as they were."""

    def __init__(self, stored: ReattendFactored) -> None:
        super().__init__()
        self.key, self.up, self.down, self.coefficients = stored.key, stored.up, stored.down, stored.coefficients
        self._bank = stored._bank

    def forward(self, x: Tensor) -> Tensor:
        """Return the projection (..., M) of `x` (..., N)."""
        down = self._bank[0](self.key) if self.down is None else self.down.weight
        if self.coefficients is None:
            return self.up(linear(x, down))  # type: ignore[no-any-return]
        return dictionary_linear(x, self.up.weight, down, self._bank[0](self.key), self.coefficients, self.up.bias)


def materialize(model: Any) -> None:
    """Put linear layers in the place of a portable model's factored projections, and drop what layers shared.

    The model is then an ordinary one, also when it is saved.
    """
    _replace(model, lambda stored: stored.dense())
    base = getattr(model, model.base_model_prefix, model)
    base.dictionary = None
    model.config.weight_dictionary = None


def run_factored(model: Any) -> None:
    """Run a portable model's factored projections on our kernel; what is saved stays the same."""
    _replace(model, FactoredLinear)


def _replace(model: Any, make: Any) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, ReattendFactored):
                setattr(module, name, make(child))
