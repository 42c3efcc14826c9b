"""Fitting a layer's matrices to what the source puts out, token by token: the loss, its least squares, its schedule.

Legend: B batch, T tokens, E outputs, D inputs of a matrix.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# Against the mean square of what a matrix reads. Without it 16k tokens overfit.
_RIDGE = 0.1


@dataclass(frozen=True)
class Schedule:
    """Steps of `windows` windows each; the rate rises over `warmup` steps, then falls to 0 as a cosine.

    `rate` is the root mean square of a step's change of a matrix, against that of the matrix.
    """

    steps: int = 24
    rate: float = 3e-3
    warmup: int = 4
    windows: int = 2

    def rate_at(self, step: int) -> float:
        """Return the rate of one step."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        return self.rate * rise * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def output_error(ours_BTE: Tensor, source_BTE: Tensor, floor: float = 0.1) -> Tensor:
    """Return the mean over tokens of |ours - source|^2 / (|source|^2 + floor x median |source|^2).

    Per token, because the first token's massive activation would otherwise be all of it.
    """
    return ((ours_BTE - source_BTE).pow(2).sum(-1) * token_weight(source_BTE, floor)).mean()


def token_weight(source_BTE: Tensor, floor: float = 0.1) -> Tensor:
    """Return the weight of a token's square error in `output_error`, (B, T); 1 where the source puts out nothing."""
    size_BT = source_BTE.pow(2).sum(-1)
    size_BT = size_BT + floor * size_BT.median()
    return 1 / torch.where(size_BT > 0, size_BT, 1.0)


def solve_linear(now_ED: Tensor, seen: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the matrix that maps inputs to targets with the least `output_error`, as a ridge lets it.

    `seen` are windows: inputs (T, D) and targets (T, E). The ridge pulls to `now_ED`. Sums are fp64.
    Raises `FloatingPointError` where they are not finite.
    """
    hidden, width = now_ED.shape
    gram_DD = torch.zeros(width, width, dtype=torch.float64)
    cross_DE = torch.zeros(width, hidden, dtype=torch.float64)
    for read_TD, target_TE in seen:
        weighed_TD = read_TD * token_weight(target_TE[None])[0, :, None]
        gram_DD += (weighed_TD.T @ read_TD).double()
        cross_DE += (weighed_TD.T @ (target_TE - read_TD @ now_ED.T)).double()
    if not bool(torch.isfinite(gram_DD).all() and torch.isfinite(cross_DE).all()):
        raise FloatingPointError("refit: the layer's inputs or outputs hold NaN or inf")
    ridge = _RIDGE * gram_DD.diagonal().mean()
    change_DE = torch.linalg.solve(gram_DD + ridge * torch.eye(width, dtype=torch.float64), cross_DE)
    solved_ED: Tensor = now_ED + change_DE.T.to(now_ED.dtype)
    return solved_ED
