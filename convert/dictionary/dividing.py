"""What errors cost, which atoms layers share, and how the numbers are divided: measured on the selection text."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reattend.calibration.divided import missing
from reattend.convert.dictionary.allocation import Option, allocate
from reattend.convert.dictionary.moments import PROJECTIONS, second_of, sensitivities, weights_of
from reattend.convert.dictionary.solving import Block, Solver
from reattend.transform import Passes, Statistics

_WHOLE = -1  # in the statistics: a matrix that stays as it is
_NOTHING_SHARED = 0.02  # captured energy beyond what norms alone explain
_Ranks = Mapping[str, int | None]


@dataclass(frozen=True)
class Budget:
    """The share of the attention weights that is kept, `numbers` in all, and what of it atoms may take."""

    solver: Solver
    blocks: tuple[tuple[int, ...], ...]
    kept: float
    numbers: int
    atom_share: float

    def atoms(self, layers: int, kept: float) -> int:
        """Return how many atoms a block of layers gets that keeps this share of a projection."""
        return atoms_for(layers, kept * self.atom_share)


def atoms_for(layers: int, share: float) -> int:
    """Return how many atoms take this share of a projection's numbers in a block of layers."""
    return min(layers, round(layers * share))


def divide(budget: Budget, passes: Passes, statistics: Statistics) -> None:
    """Measure sensitivities, find atoms, and write `ranks` and `atoms`, and each block's parts, to the statistics.

    With `pca` all blocks have atoms. With `als` a block has them for a projection where they are worth their numbers:
    factors alone are divided first, and what that gives the projection tells how many atoms, and which rank, to try.
    """
    options = {key: [option] for key, option in _options(budget, passes, statistics, None)}
    if budget.solver == "als":
        _, ranks = allocate(options, budget.numbers)
        for key, option in _options(budget, passes, statistics, ranks):
            options[key].append(option)
    taken, ranks = allocate(options, budget.numbers)
    statistics["ranks"] = {name: torch.tensor(_WHOLE if rank is None else rank) for name, rank in ranks.items()}
    counts = {key: len(statistics[key]["atoms"]) if options[key][index].shared else 0 for key, index in taken.items()}
    statistics["atoms"] = {key: torch.tensor(count) for key, count in counts.items()}


def ranks_in(statistics: Statistics) -> dict[str, int | None]:
    """Return the ranks that were found, None for a matrix that stays whole."""
    return {name: None if int(rank) == _WHOLE else int(rank) for name, rank in statistics["ranks"].items()}


def shared_in(statistics: Statistics, key: str) -> Mapping[str, Tensor]:
    """Return the atoms, coefficients and energy of a projection's block; nothing where it has none."""
    return statistics[key] if int(statistics["atoms"][key]) else {}


def findings_in(statistics: Statistics, solver: Solver) -> dict[str, Any]:
    """Return `ranks`, and, of atoms, how many, and the energy that they capture beyond what norms explain."""
    ranks = {name: "whole" if rank is None else rank for name, rank in ranks_in(statistics).items()}
    found: dict[str, Any] = {"ranks": _by_projection(ranks, ".")}
    if solver not in ("pca", "als"):
        return found
    found["atoms"] = _by_projection({key: int(count) for key, count in statistics["atoms"].items()}, "-")
    energies = {key: statistics[key]["energy"].tolist() for key in statistics["atoms"] if key in statistics}
    beyond = {key: float(f"{captured - expected:.4g}") for key, (captured, expected) in energies.items()}
    found["energy_beyond_norms"] = {name: list(row.values()) for name, row in _by_projection(beyond, "-").items()}
    if solver == "pca" and max(beyond.values(), default=0.0) < _NOTHING_SHARED:
        found["warning"] = "layers share no directions, only their norms differ: solvers svd and als lose less"
    return found


def _by_projection(values: Mapping[str, Any], mark: str) -> dict[str, dict[str, Any]]:
    """Return projection -> layer -> value of names such as `q_proj-5`."""
    found: dict[str, dict[str, Any]] = {}
    for name in sorted(values, key=lambda name: int(name.rpartition(mark)[2])):
        projection, _, layer = name.partition(mark)
        found.setdefault(projection, {})[layer] = values[name]
    return found


def block_of(
    name: str, layers: tuple[int, ...], held: Mapping[int, Mapping[str, Tensor]], statistics: Statistics
) -> Block:
    """Return a projection of a block's layers, whose weights are `held` by layer and projection."""
    second = torch.stack([second_of(name, statistics[f"moments-{layer}"]) for layer in layers])
    return Block(name, layers, torch.stack([held[layer][name] for layer in layers]), second)


def _held_blocks(
    budget: Budget, passes: Passes, statistics: Statistics, windows: int | None
) -> Iterator[tuple[tuple[int, ...], dict[int, dict[str, Tensor]]]]:
    """Yield each block and its weights by layer; sensitivities that are missing are measured on the way."""
    held: dict[int, dict[str, Tensor]] = {}
    for layer in passes("selection", windows=windows):
        i = layer.index
        if missing(statistics, f"sensitivity-{i}"):
            statistics[f"sensitivity-{i}"] = sensitivities(layer, statistics[f"moments-{i}"])
        held[i] = weights_of(layer)
        block = next(block for block in budget.blocks if i in block)
        if i == block[-1]:
            yield block, held
            held.clear()


def _options(
    budget: Budget, passes: Passes, statistics: Statistics, ranks: _Ranks | None
) -> Iterator[tuple[str, Option]]:
    """Yield a way to make each projection of each block, by a name for both.

    Without `ranks`, those that factors alone were given, `als` has no atoms yet.
    """
    windows = None if ranks is None else 1  # for the weights alone, once sensitivities are there
    for layers, held in _held_blocks(budget, passes, statistics, windows):
        for name in PROJECTIONS:
            block, key = block_of(name, layers, held, statistics), f"{name}-{layers[0]}"
            weigh = {i: float(statistics[f"sensitivity-{i}"][name]) for i in layers}
            kept = budget.kept if ranks is None else block.kept(ranks)
            count = 0 if budget.solver == "als" and ranks is None else budget.atoms(len(layers), kept)
            shared = block.atoms(budget.solver, count, block.rank(kept - count / len(layers)), list(weigh.values()))
            if shared:
                statistics[key] = shared
            elif ranks is not None:
                continue  # too little is kept for an atom
            curves = {
                unit.name: block.curve(unit, shared, sum(weigh[i] for i in unit.layers) / len(unit.layers))
                for unit in block.units(budget.solver)
            }
            yield key, Option(count * (block.weight_LMN[0].numel() + len(layers)) if shared else 0, curves)
