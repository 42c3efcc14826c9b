"""How near quantised attention comes to exact attention.

SageAttention (arXiv 2410.02367) measures the cosine of the flattened outputs and their relative L1 distance, and
chooses each layer's kernel by the first (section 4.5).
"""

import torch
from torch import Tensor


def similarity(ours: Tensor, exact: Tensor) -> Tensor:
    """Return [cosine, relative L1] (2,), fp64, of two outputs of one shape; [1, 0] where both are zero."""
    a, b = ours.double().flatten(), exact.double().flatten()
    size = a.norm() * b.norm()
    cosine = (a @ b) / size if size > 0 else (a.norm() == b.norm()).double()
    distance = (a - b).abs().sum() / b.abs().sum().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.stack([cosine, distance])


def worst(found: list[Tensor]) -> Tensor:
    """Return the least cosine and the largest distance (2,) of several windows."""
    both = torch.stack(found)
    return torch.stack([both[:, 0].min(), both[:, 1].max()])
