"""Momentum whose steps are made orthogonal (Muon; Jordan 2024, arXiv 2502.16982).

A step's singular values become about one, so that directions in which the loss is flat are moved as far as the
steep ones; a few dozen steps are all there is. Its size is set against the matrix's own.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

_MOMENTUM = 0.9


def orthogonal(matrix_XMN: Tensor, rounds: int = 5) -> Tensor:
    """Return matrices with the same singular vectors, and singular values near 1 (Newton-Schulz, quintic)."""
    tall = matrix_XMN.shape[-2] > matrix_XMN.shape[-1]
    wide = matrix_XMN.mT if tall else matrix_XMN
    x: Tensor = wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp(min=1e-30)
    for _ in range(rounds):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class OrthogonalMomentum:
    """Descends on matrices or batches of matrices, in place."""

    def __init__(self, matrices: Iterable[Tensor]):
        self._matrices = list(matrices)
        self._momenta = [torch.zeros_like(matrix) for matrix in self._matrices]
        self._sizes = [_size(matrix.detach()) for matrix in self._matrices]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move every matrix by `rate` times its size at the start, and clear the gradients."""
        for matrix, momentum, size in zip(self._matrices, self._momenta, self._sizes, strict=True):
            assert matrix.grad is not None
            momentum.mul_(_MOMENTUM).add_(matrix.grad)
            change = orthogonal(matrix.grad + _MOMENTUM * momentum)
            matrix -= change * (rate * size / _size(change).clamp(min=1e-30))
            matrix.grad = None


def _size(matrix: Tensor) -> Tensor:
    return matrix.square().mean().sqrt()
