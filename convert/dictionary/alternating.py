"""Atoms and low-rank factors found together: alternating least squares that expects what factors will hold.

    minimise sum_l E |(W_l - sum_s c_ls D_s - U_l V_l) x_l|^2

Atoms alone would be spent on the few directions that inputs excite most, which factors hold at next to no cost, and
what is left would be large in all others.

Legend: L layers, M outputs, N inputs of a matrix, S atoms, R rank of the factors.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reattend.convert.dictionary.formulas import fit_atoms, fit_coefficients, matrix_pca, root

_LONGER, _SHORTER = 1.15, 0.5  # what a step ahead is multiplied by after it helped, and after it did not
_FIRST = 0.5


@dataclass(frozen=True)
class Alternation:
    """Where the search is. `factored` (L, M, N) is U V, `bases` are orthonormal columns (M, R), U's span."""

    atoms_SMN: Tensor
    coefficient_LS: Tensor
    factored_LMN: Tensor
    bases: tuple[Tensor, ...]
    objective: float


class Alternating:
    """The search for a block: weights (L, M, N) and second moments of inputs (L, N, N), fp64."""

    def __init__(self, weight_LMN: Tensor, second_LNN: Tensor) -> None:
        self.weight_LMN = weight_LMN
        self._root_LNN = torch.stack([root(second) for second in second_LNN])
        self._second_LNN = self._root_LNN @ self._root_LNN.mT  # with the ridge that factors are found with

    def starts(self, atoms: int, ranks: Sequence[int]) -> Iterator[Alternation]:
        """Yield two places to begin: each layer's best factors, then atoms of what they leave; atoms, then factors.

        Atoms are found by matrix PCA. A layer counts there by the mean square of its inputs: sweeps could not turn an
        atom from one layer to another that shares nothing with it.
        """
        whole = self.weight_LMN
        first = self._spans(whole, ranks)
        left = torch.stack([weight - span @ (span.T @ weight) for weight, span in zip(whole, first, strict=True)])
        yield self._factor(*self._pca(left, atoms), first)
        atoms_SMN, coefficient_LS = self._pca(whole, atoms)
        left = whole - torch.einsum("ls,smn->lmn", coefficient_LS, atoms_SMN)
        yield self._factor(atoms_SMN, coefficient_LS, self._spans(left, ranks))

    def _spans(self, left_LMN: Tensor, ranks: Sequence[int]) -> list[Tensor]:
        """Return the columns (M, R) that the best factors of each layer span."""
        reads = left_LMN @ self._root_LNN
        return [torch.linalg.svd(y, full_matrices=False)[0][:, :rank] for y, rank in zip(reads, ranks, strict=True)]

    def _pca(self, left_LMN: Tensor, atoms: int) -> tuple[Tensor, Tensor]:
        size_L = self._root_LNN.flatten(1).norm(dim=1)
        atoms_SMN, coefficient_LS, _ = matrix_pca(left_LMN * size_L[:, None, None], atoms)
        return atoms_SMN, coefficient_LS / size_L[:, None]

    def sweep(self, now: Alternation, aim_LMN: Tensor) -> Alternation:
        """Fit coefficients, atoms, then factors, once each: atoms to what `aim_LMN` leaves of the weights.

        With `now.factored_LMN` for an aim the objective does not rise, as no part of the step raises it.
        """
        left = self.weight_LMN - aim_LMN
        coefficient_LS = fit_coefficients(left, self._second_LNN, now.atoms_SMN)
        atoms_SMN = fit_atoms(left, self._second_LNN, now.atoms_SMN, coefficient_LS)
        return self._factor(atoms_SMN, coefficient_LS, now.bases)

    def _factor(self, atoms_SMN: Tensor, coefficient_LS: Tensor, bases: Sequence[Tensor]) -> Alternation:
        """Turn bases to the largest singular vectors by one power iteration; the other factor is solved exactly."""
        left_LMN = self.weight_LMN - torch.einsum("ls,smn->lmn", coefficient_LS, atoms_SMN)
        turned, factored, objective = [], [], 0.0
        for left, factor, basis in zip(left_LMN, self._root_LNN, bases, strict=True):
            read = left @ factor
            turned.append(torch.linalg.qr(read @ (read.T @ basis))[0])
            factored.append(turned[-1] @ (turned[-1].T @ left))
            objective += float((read - turned[-1] @ (turned[-1].T @ read)).square().sum())
        return Alternation(atoms_SMN, coefficient_LS, torch.stack(factored), tuple(turned), objective)


def alternated(search: Alternating, atoms: int, ranks: Sequence[int]) -> Alternation:
    """Return where the better of two starts leads, better after ten sweeps."""
    tried = [alternate(search, start, most=10)[-1] for start in search.starts(atoms, ranks)]
    return alternate(search, min(tried, key=lambda place: place.objective))[-1]


def alternate(search: Alternating, begun: Alternation, gain: float = 3e-3, most: int = 100) -> list[Alternation]:
    """Return the places that a search goes through, whose objective never rises.

    It ends after `most` sweeps, or once ten gain less than ten times the share `gain`. Convergence is slow, so atoms
    are fitted to where factors are heading; a step ahead that ends higher is taken back.
    """
    places, ahead = [begun, search.sweep(begun, begun.factored_LMN)], _FIRST
    while len(places) <= most:
        now, before = places[-1], places[-2]
        if len(places) > 10 and now.objective > (1 - 10 * gain) * places[-11].objective:
            break
        tried = search.sweep(now, now.factored_LMN + ahead * (now.factored_LMN - before.factored_LMN))
        ahead *= _LONGER if tried.objective <= now.objective else _SHORTER
        places.append(tried if tried.objective <= now.objective else search.sweep(now, now.factored_LMN))
    return places
