"""A model as it would run in static W8A8, simulated on the model itself (Bondarenko et al., arXiv 2306.12929, 5).

Rounded to 8 bit, all per tensor: the weight and the input of every linear of every layer; queries, keys and values as
attention gets them, scores, and weights. Full precision stay embeddings, norms, the residual stream, what linears add
to it, and the head. The paper rounds those too, but for the head of OPT.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from reattend.calibration.attention_calls import during_calls, replaced_attention
from reattend.calibration.layerwise import layers_in
from reattend.errors import Refusal
from reattend.evaluation.outlier_statistics import score_blocks
from reattend.evaluation.static_quantization import ActivationRange, rounded_activation, rounded_weight
from reattend.families.rows import Family
from reattend.kernels.attention import Options
from reattend.kernels.attention.reference import mix, weights


class Simulation:
    """Says whether ranges still follow what they see: until `freeze` they do, and round by what they have seen."""

    def __init__(self) -> None:
        self.calibrating = True

    def freeze(self) -> None:
        """Keep all ranges as they are from here on."""
        self.calibrating = False


@contextmanager
def static_w8a8(model: nn.Module, family: Family) -> Iterator[Simulation]:
    """Let `model` run as in static W8A8, a window a call; afterwards it is what it was.

    Run the calibration windows, then `freeze`, then what is to be measured. Weights are rounded at each use, so
    that no second copy of the model is held. Raises `Refusal` where weights lie on the disk.
    """
    simulation = Simulation()
    with ExitStack() as stack:
        for index, layer in enumerate(layers_in(model, family)):
            for name in family.linears:
                linear = layer.get_submodule(name)
                if linear.weight.device.type == "meta":
                    raise Refusal(f"layer {index}, {name}: static W8A8 is simulated in memory, and its weight is not")
                stack.enter_context(_rounded_linear(linear, simulation))
            stack.enter_context(during_calls(layer, _rounding(layer, simulation)))
        yield simulation


@contextmanager
def _rounded_linear(linear: nn.Module, simulation: Simulation) -> Iterator[None]:
    inputs = ActivationRange()

    def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if simulation.calibrating:
            inputs.see(args[:1])
        return (inputs.rounded(args[0]), *args[1:])

    hook = linear.register_forward_pre_hook(enter)
    parametrize.register_parametrization(linear, "weight", _RoundedWeight(), unsafe=True)
    try:
        yield
    finally:
        hook.remove()
        parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)


class _RoundedWeight(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return rounded_weight(weight)


def _rounding(layer: nn.Module, simulation: Simulation) -> Callable[[], AbstractContextManager[None]]:
    attention = _RoundedAttention(simulation)
    return lambda: replaced_attention(layer, attention)


class _RoundedAttention:
    """One layer's attention in 8 bit, a few queries at a time."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._inputs = [ActivationRange() for _ in range(3)]
        self._scores = ActivationRange()

    def __call__(self, query_BHSD: Tensor, key_BGTD: Tensor, value_BGTV: Tensor, options: Options) -> Tensor:
        query, key, value = (
            self._rounded_input(each, tensor)
            for each, tensor in zip(self._inputs, (query_BHSD, key_BGTD, value_BGTV), strict=True)
        )
        if self._simulation.calibrating:  # the range is of all scores: so before any are rounded
            self._scores.see(block for _, block, _ in score_blocks(query, key, options))
        outputs = [self._mixed(block, value, rows) for _, block, rows in score_blocks(query, key, options)]
        return torch.cat(outputs, 2).to(query.dtype)

    def _rounded_input(self, found: ActivationRange, tensor: Tensor) -> Tensor:
        if self._simulation.calibrating:
            found.see([tensor])
        return found.rounded(tensor)

    def _mixed(self, score_BHRT: Tensor, value_BGTV: Tensor, rows: Options) -> Tensor:
        weight_BHRT, _ = weights(self._scores.rounded(score_BHRT), rows)
        # Their range needs no calibration: a first token sees itself alone, with weight 1.
        return mix(rounded_activation(weight_BHRT, 0.0, 1.0), value_BGTV)
