"""A block's projections as they are stored in the portable model: factors, and what layers share with its owner."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from reattend.checkpoint.header import TensorSpec
from reattend.convert.dictionary.moments import PROJECTIONS
from reattend.convert.dictionary.solving import Block, Solver
from reattend.families.source import Source


@dataclass(frozen=True)
class StoredBlock:
    """Names, shapes and tensors of a run of layers; `atoms` by projection, `ranks` as the step has them."""

    source: Source
    solver: Solver
    layers: tuple[int, ...]
    atoms: Mapping[str, int]
    ranks: Mapping[str, Mapping[int, int | Literal["whole"]]]

    def rank(self, name: str, layer: int) -> int | None:
        """Return a projection's rank in a layer, None where it is whole."""
        found = self.ranks[name][self.layers[0] if self._shares(name) else layer]
        return None if found == "whole" else found

    def _shares(self, name: str) -> bool:
        return self.solver == "basis" and name != "o_proj"

    def _name(self, name: str, layer: int) -> str:
        return f"{self.source.layer_prefix(layer)}self_attn.{name}"

    def _owner(self, name: str) -> str:
        return f"{self.source.prefix}dictionary.{name}_{self.layers[0]}"

    def specs(self) -> Iterator[TensorSpec]:
        """Yield what is written for the block."""
        for name in PROJECTIONS:
            weight = self.source.tensors[f"{self._name(name, self.layers[0])}.weight"]
            rows, columns = weight.shape
            rank = self.rank(name, self.layers[0])
            if self.atoms[name]:
                yield TensorSpec(self._owner(name), weight.dtype, (self.atoms[name], rows, columns))
            elif self._shares(name) and rank is not None:
                yield TensorSpec(self._owner(name), weight.dtype, (rank, columns))
            for layer in self.layers:
                yield from self._layer_specs(name, layer)

    def _layer_specs(self, name: str, layer: int) -> Iterator[TensorSpec]:
        own, rank = self._name(name, layer), self.rank(name, layer)
        weight, bias = self.source.tensors[f"{own}.weight"], self.source.tensors.get(f"{own}.bias")
        if rank is None:
            yield weight
        else:
            yield TensorSpec(f"{own}.up.weight", weight.dtype, (weight.shape[0], rank))
            if not self._shares(name):
                yield TensorSpec(f"{own}.down.weight", weight.dtype, (rank, weight.shape[1]))
            if self.atoms[name]:
                yield TensorSpec(f"{own}.coefficients", weight.dtype, (self.atoms[name],))
        if bias is not None:
            yield bias if rank is None else TensorSpec(f"{own}.up.bias", bias.dtype, bias.shape)

    def tensors(self, block: Block, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a projection's factors, coefficients and what is shared, by name; whole ones are left out."""
        name, written = block.projection, {}
        if shared:
            written[self._owner(name)] = shared["atoms"]
        for unit in block.units(self.solver):
            rank = self.rank(name, unit.layers[0])
            if rank is None:
                continue
            up, down = block.factors(unit, shared, rank)
            if self._shares(name):
                written[self._owner(name)] = down
            for layer, part in zip(unit.layers, up.chunk(len(unit.layers)), strict=True):
                own = self._name(name, layer)
                written[f"{own}.up.weight"] = part
                if not self._shares(name):
                    written[f"{own}.down.weight"] = down
                if shared:
                    written[f"{own}.coefficients"] = shared["coefficients"][self.layers.index(layer)]
        return written

    def kept(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return whole weights and all biases, under the names that they have in the output."""
        found = {}
        for name in PROJECTIONS:
            for layer in self.layers:
                own, whole = self._name(name, layer), self.rank(name, layer) is None
                if whole:
                    found[f"{own}.weight"] = tensors[f"{own}.weight"]
                if f"{own}.bias" in tensors:
                    found[f"{own}.bias" if whole else f"{own}.up.bias"] = tensors[f"{own}.bias"]
        return found
