"""Gates that change nothing at first: their tensors, and what is folded into the output projection.

Legend: H heads, E hidden size, V value dim, N hidden units of a gate. Source: Bondarenko, Nagel, Blankevoort,
"Quantizable Transformers" (arXiv 2306.12929), section 4.2 and appendix B.6; the fold (1 / pi0) is ours.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["linear", "mlp", "all_heads_linear", "elementwise"]


@dataclass(frozen=True)
class GateShape:
    """What a gate's tensors are shaped by."""

    kind: Kind
    hidden: int
    heads: int
    value_dim: int
    units: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of a layer's gate, as `AttentionGate` holds them."""
        slice_ = self.hidden // self.heads
        if self.kind == "linear":
            return {"weight": (self.heads, slice_), "bias": (self.heads,)}
        if self.kind == "mlp":
            return {
                "in_weight": (self.heads, self.units, slice_), "in_bias": (self.heads, self.units),
                "weight": (self.heads, self.units), "bias": (self.heads,),
            }  # fmt: skip
        outputs = self.heads * (self.value_dim if self.kind == "elementwise" else 1)
        return {"proj.weight": (outputs, self.hidden), "proj.bias": (outputs,)}


def start_tensors(shape: GateShape, openness: float, seed: int) -> dict[str, Tensor]:
    """Return a gate, in fp64, that is open by `openness` for every input.

    The last map's weight is zero, its bias logit(openness). Only an mlp's first map is drawn, from `seed`: with both
    at zero no gradient would reach either.
    """
    tensors = {name: torch.zeros(size, dtype=torch.float64) for name, size in shape.tensors().items()}
    for name in ("bias", "proj.bias"):
        if name in tensors:
            tensors[name] += math.log(openness / (1 - openness))
    if shape.kind == "mlp":
        first = tensors["in_weight"]
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(first.shape, generator=generator, dtype=torch.float64)
        tensors["in_weight"] = drawn / math.sqrt(first.shape[-1])
    return tensors


def stored_openness(openness: float, dtype: torch.dtype) -> float:
    """Return how open a gate is whose bias is rounded to `dtype`: what has to be folded is its inverse."""
    bias = torch.tensor(math.log(openness / (1 - openness)), dtype=torch.float64).to(dtype)
    return float(torch.sigmoid(bias.double()))
