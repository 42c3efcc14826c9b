"""The four solvers: what layers share of their projections, and the low-rank factors of what is left.

A block is a run of layers that share. `svd` and `basis` factor a projection of all its layers, stacked, at one rank:
W_l = up_l down. `pca` and `als` take atoms first, W_l = sum_s c_ls D_s, and factor what is left of each layer.

Legend: L layers of a block, M outputs, N inputs, S atoms, R rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from reattend.convert.dictionary.allocation import Curve
from reattend.convert.dictionary.alternating import Alternating, alternated
from reattend.convert.dictionary.formulas import low_rank, matrix_pca, root, shared_energy, tail

Solver = Literal["svd", "basis", "pca", "als"]
_LEAST = 1e-6  # of the largest weight: what a layer without effect still counts


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
    """A projection of a block's layers, fp64: weights (L, M, N) and second moments of inputs (L, N, N)."""

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

    def kept(self, ranks: Mapping[str, int | None]) -> float:
        """Return the share of the numbers that matrices factored one by one keep at these ranks, None for whole."""
        rows, columns = self.weight_LMN.shape[1:]
        whole = rows * columns
        spent = 0
        for layer in self.layers:
            rank = ranks[Unit(self.projection, (layer,)).name]
            spent += whole if rank is None else rank * (rows + columns)
        return spent / (whole * len(self.layers))

    def rank(self, kept: float) -> int:
        """Return the rank, at least 1, whose factors take this share of a matrix's numbers."""
        rows, columns = self.weight_LMN.shape[1:]
        return max(1, int(kept * rows * columns / (rows + columns)))

    def atoms(self, solver: Solver, count: int, rank: int, weights: Sequence[float]) -> dict[str, Tensor]:
        """Return `atoms` (S, M, N), `coefficients` (L, S) and `energy` (2,), as `shared_energy`; nothing without.

        `als` expects factors of `rank`, and counts each layer's square error `weights` times.
        """
        if solver not in ("pca", "als") or not count:
            return {}
        if solver == "pca":
            atoms, coefficients, _ = matrix_pca(self.weight_LMN, count)
        else:
            atoms, coefficients = self._alternated(count, rank, weights)
        energy = torch.tensor(shared_energy(self.weight_LMN, count), dtype=torch.float64)
        return {"atoms": atoms, "coefficients": coefficients, "energy": energy}

    def _alternated(self, count: int, rank: int, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
        weigh_L = torch.tensor(weights, dtype=torch.float64)
        weigh_L = (weigh_L / weigh_L.max().clamp_min(_LEAST)).clamp_min(_LEAST)
        search = Alternating(self.weight_LMN, self.second_LNN * weigh_L[:, None, None])
        found = alternated(search, count, [rank] * len(self.layers))
        return found.atoms_SMN, found.coefficient_LS

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
