"""The four solvers: what layers share of their projections, and the low-rank factors of what is left.

A block is a run of layers that share. `svd` and `basis` factor a projection of all its layers, stacked, at one rank:
W_l = up_l down. `pca` and `als` take atoms first, W_l = sum_s c_ls D_s, and factor what is left of each layer.

Legend: L layers of a block, M outputs, N inputs, S atoms, R rank.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from reattend.convert.dictionary.allocation import Curve
from reattend.convert.dictionary.formulas import alternate, low_rank, matrix_pca, root, shared_energy, tail

Solver = Literal["svd", "basis", "pca", "als"]
_SWEEPS = 12  # of als: the objective falls by less than a percent after


@dataclass(frozen=True)
class Unit:
    """A projection of some layers that is factored at one rank."""

    projection: str
    layers: tuple[int, ...]

    @property
    def name(self) -> str:
        """A name that begins with the projection's."""
        return f"{self.projection}.{self.layers[0]}"


@dataclass(frozen=True)
class Block:
    """A projection of a block's layers, fp64: weights (L, M, N) and second moments (L, N, N)."""

    projection: str
    layers: tuple[int, ...]
    weight_LMN: Tensor
    second_LNN: Tensor

    def units(self, solver: Solver) -> Iterator[Unit]:
        """Yield what is factored: all layers together where a basis is shared, which outputs' inputs don't allow."""
        if solver == "basis" and self.projection != "o_proj":
            yield Unit(self.projection, self.layers)
        else:
            yield from (Unit(self.projection, (layer,)) for layer in self.layers)

    def atoms(self, solver: Solver, count: int) -> dict[str, Tensor]:
        """Return `atoms` (S, M, N), `coefficients` (L, S) and `energy` (2,), as `shared_energy`; nothing without."""
        if solver not in ("pca", "als") or not count:
            return {}
        if solver == "pca":
            atoms, coefficients, _ = matrix_pca(self.weight_LMN, count)
        else:
            atoms, coefficients, _ = alternate(self.weight_LMN, self.second_LNN, count, _SWEEPS)
        energy = torch.tensor(shared_energy(self.weight_LMN, count), dtype=torch.float64)
        return {"atoms": atoms, "coefficients": coefficients, "energy": energy}

    def rest(self, unit: Unit, shared: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return what is left to factor for a unit, stacked (L M, N), and the Cholesky factor of its inputs."""
        places = [self.layers.index(layer) for layer in unit.layers]
        left = self.weight_LMN[places]
        if shared:
            left = left - torch.einsum("ls,smn->lmn", shared["coefficients"][places], shared["atoms"])
        return left.flatten(0, 1), root(self.second_LNN[places].sum(0))

    def curve(self, unit: Unit, shared: Mapping[str, Tensor], sensitivity: float) -> Curve:
        """Return what a unit puts wrong in its layers' outputs, by rank."""
        left, factor = self.rest(unit, shared)
        return Curve(tail(left, factor) * sensitivity, (left.shape[0], left.shape[1]), whole=not shared)

    def factors(self, unit: Unit, shared: Mapping[str, Tensor], rank: int) -> tuple[Tensor, Tensor]:
        """Return a unit's up (L M, R) and down (R, N)."""
        return low_rank(*self.rest(unit, shared), rank)

    def rebuilt(self, solver: Solver, shared: Mapping[str, Tensor], ranks: Mapping[str, int | None]) -> Tensor:
        """Return the weights (L, M, N) that atoms and factors make."""
        rows, columns = self.weight_LMN.shape[1:]
        made = torch.empty_like(self.weight_LMN)
        for unit in self.units(solver):
            places, rank = [self.layers.index(layer) for layer in unit.layers], ranks[unit.name]
            if rank is None:
                made[places] = self.weight_LMN[places]
                continue
            up, down = self.factors(unit, shared, rank)
            made[places] = (up @ down).view(len(places), rows, columns)
            if shared:
                made[places] += torch.einsum("ls,smn->lmn", shared["coefficients"][places], shared["atoms"])
        return made
