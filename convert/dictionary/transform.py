"""The step `dictionary`: attention weights from parts that layers share and low-rank factors."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from reattend.calibration.divided import any_missing, missing
from reattend.checkpoint.tensors import TORCH_DTYPES
from reattend.convert.dictionary.allocation import Curve, allocate
from reattend.convert.dictionary.checks import check_source
from reattend.convert.dictionary.moments import PROJECTIONS, gather_moments, second_of, sensitivities, weights_of
from reattend.convert.dictionary.solving import Block, Solver
from reattend.convert.dictionary.storing import StoredBlock
from reattend.convert.portable.form import check_portable, code_files, portable_config
from reattend.errors import DeadEndError, Refusal
from reattend.families.source import Source
from reattend.transform import Group, Passes, Statistics

_Number = Annotated[int, Field(strict=True)]
_WHOLE = -1  # in the statistics: a matrix that stays as it is
_NOTHING_SHARED = 0.02  # captured energy beyond what norms alone explain


class Dictionary(BaseModel):
    """Weight dictionaries across layers (MASA), Basis Sharing, SVD-LLM: attention weights from fewer numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: Literal["dictionary"] = "dictionary"
    reduction: float = Field(0.2, gt=0, lt=1, strict=True, description="share of the attention weights removed")
    solver: Solver = Field(
        "svd", description="svd: factors per matrix; basis: one basis for a block; pca, als: atoms and factors"
    )
    blocks: _Number | tuple[_Number, ...] | None = Field(
        None, description="layers per block, or the first layer of each; svd: 1, basis: 2, pca and als: 5"
    )
    atom_share: float = Field(
        0.5, ge=0, le=1, strict=True, description="pca, als: share of the numbers kept that goes to atoms"
    )

    export: Literal["dense", "factors"] = Field(
        "dense", description="dense: the source's format; factors: as few numbers as are kept, in the portable model"
    )
    ranks: dict[str, dict[int, int | Literal["whole"]]] | None = Field(
        None, description="export: factors: the ranks that calibration divided, as `reattend.json` lists them"
    )

    @property
    def tolerance(self) -> float:
        """Relative L2 of logits: what looks broken is caught, no more; `eval` tells what was lost."""
        return 1.0

    @property
    def texts(self) -> tuple[str, ...]:
        """Moments come from one text, sensitivities from the other."""
        return ("calibration", "selection")

    @property
    def undecided(self) -> bool:
        """Whether calibration decides which shapes are written: dense weights keep theirs."""
        return self.export == "factors" and self.ranks is None

    def settled(self, findings: Mapping[str, Any]) -> "Dictionary":
        """Return the step with the ranks that were found."""
        if not self.undecided:
            return self
        ranks = {name: {int(layer): rank for layer, rank in row.items()} for name, row in findings["ranks"].items()}
        return self.model_copy(update={"ranks": ranks})

    def check(self, source: Source) -> list[str]:
        """Refuse sources whose projections can't be factored, and blocks that don't fit."""
        check_source(source)
        blocks = self._blocks(source)
        attention = self._numbers(source)
        kept, atoms = int((1 - self.reduction) * attention), self._shared_numbers(source)
        if atoms > kept:
            raise Refusal(f"dictionary: atom_share: atoms take {atoms} numbers of {kept}; lower it")
        if self.ranks is not None:
            self._check_ranks(source, self.ranks)
        held = "the output holds them dense, in the source's format: as large and as fast as before"
        if self.export == "factors":
            check_portable(source, self.step)
            held = "the output holds them alone, in the portable model"
            held += "; sizes are those of the source: calibration decides which they are" if self.undecided else ""
        remarks = [f"attention weights are made from {kept} numbers, before {attention}; {held}"]
        if self.solver in ("pca", "als"):
            count = sum(self._atoms(len(block)) for block in blocks)
            remarks.append(f"{count} atoms per projection in {len(blocks)} blocks; {self.solver} needs layers alike")
        return remarks

    def _check_ranks(self, source: Source, ranks: Mapping[str, Mapping[int, int | str]]) -> None:
        if self.export == "dense":
            raise Refusal("dictionary: ranks: do nothing with export: dense")
        for block in self._blocks(source):
            for name in PROJECTIONS:
                for layer in block[:1] if self.solver == "basis" and name != "o_proj" else block:
                    shape = source.tensors[f"{source.layer_prefix(layer)}self_attn.{name}.weight"].shape
                    rank = ranks.get(name, {}).get(layer)
                    whole = rank == "whole" and not self._atoms(len(block))
                    if not whole and not (isinstance(rank, int) and 1 <= rank <= min(shape)):
                        raise Refusal(
                            f"dictionary: ranks: {name}: {layer}: {rank!r}, expected 1 to {min(shape)}, or whole"
                        )

    def _blocks(self, source: Source) -> list[tuple[int, ...]]:
        layers, given = source.num_layers, self.blocks
        if isinstance(given, tuple):
            if not given or given[0] != 0 or list(given) != sorted(set(given)) or given[-1] >= layers:
                raise Refusal(f"dictionary: blocks: expected rising layers from 0 to below {layers}")
            return [tuple(range(a, b)) for a, b in zip(given, (*given[1:], layers), strict=True)]
        size = {"svd": 1, "basis": 2}.get(self.solver, 5) if given is None else given
        if not 1 <= size <= layers:
            raise Refusal(f"dictionary: blocks: {size}, expected 1 to {layers} layers")
        return [tuple(range(a, min(a + size, layers))) for a in range(0, layers, size)]

    def _atoms(self, layers: int) -> int:
        if self.solver not in ("pca", "als"):
            return 0
        return min(layers, round(layers * (1 - self.reduction) * self.atom_share))

    def _numbers(self, source: Source) -> int:
        return sum(
            source.tensors[f"{source.layer_prefix(layer)}self_attn.{name}.weight"].numel
            for layer in range(source.num_layers)
            for name in PROJECTIONS
        )

    def calibrate(self, source: Source, passes: Passes, statistics: Statistics) -> None:
        """Gather moments; measure how errors weigh; find atoms; divide the numbers among the matrices."""
        layers = range(source.num_layers)
        if any_missing(statistics, (f"moments-{i}" for i in layers)):
            for layer in passes("calibration"):
                if missing(statistics, f"moments-{layer.index}"):
                    statistics[f"moments-{layer.index}"] = gather_moments(layer)
        if any_missing(statistics, (f"sensitivity-{i}" for i in layers)) or "ranks" not in statistics:
            self._measure(source, passes, statistics)

    def _measure(self, source: Source, passes: Passes, statistics: Statistics) -> None:
        curves, blocks = dict[str, Curve](), self._blocks(source)
        held: dict[int, dict[str, Tensor]] = {}
        for layer in passes("selection"):
            i = layer.index
            if missing(statistics, f"sensitivity-{i}"):
                statistics[f"sensitivity-{i}"] = sensitivities(layer, statistics[f"moments-{i}"])
            held[i] = weights_of(layer)
            block = next(block for block in blocks if i in block)
            if i == block[-1]:
                self._share(block, held, statistics, curves)
                held.clear()
        atoms = self._shared_numbers(source)
        try:
            ranks = allocate(curves, int((1 - self.reduction) * self._numbers(source)) - atoms)
        except ValueError as error:
            raise DeadEndError(f"dictionary: reduction: {self.reduction} can't be reached: {error}") from error
        found = {name: torch.tensor(_WHOLE if rank is None else rank) for name, rank in ranks.items()}
        statistics["ranks"] = found

    def _shared_numbers(self, source: Source) -> int:
        total = 0
        for block in self._blocks(source):
            atoms = self._atoms(len(block))
            for name in PROJECTIONS:
                size = source.tensors[f"{source.layer_prefix(block[0])}self_attn.{name}.weight"].numel
                total += atoms * (size + len(block))
        return total

    def _share(
        self,
        layers: tuple[int, ...],
        held: Mapping[int, Mapping[str, Tensor]],
        statistics: Statistics,
        curves: dict[str, Curve],
    ) -> None:
        for name in PROJECTIONS:
            block = _block(name, layers, held, statistics)
            shared = block.atoms(self.solver, self._atoms(len(layers)))
            if shared:
                statistics[f"{name}-{layers[0]}"] = shared
            for unit in block.units(self.solver):
                weights = [float(statistics[f"sensitivity-{i}"][name]) for i in unit.layers]
                curves[unit.name] = block.curve(unit, shared, sum(weights) / len(weights))

    def statistics_bytes(self, source: Source) -> int:
        """Moments in fp64, atoms, and small files."""
        hidden, output = source.size("hidden"), source.size("q")
        moments = 8 * (2 * hidden**2 + output**2) * source.num_layers
        moments += 1 << 17 if self.export == "factors" else 0  # the code
        return moments + 8 * self._shared_numbers(source) + (1 << 14) * (source.num_layers + 1)

    def groups(self, source: Source) -> Iterator[Group]:
        """Yield each block's projections; to be factored, once ranks are known, with their biases."""
        for block in self._blocks(source):
            prefixes = [f"{source.layer_prefix(layer)}self_attn." for layer in block]
            names = [f"{prefix}{name}.weight" for prefix in prefixes for name in PROJECTIONS]
            if self.export == "dense":
                yield Group(tuple(names), tuple(source.tensors[name] for name in names), key=str(block[0]))
            elif self.ranks is not None:
                names += [bias for name in names if (bias := f"{name[:-6]}bias") in source.tensors]
                yield Group(tuple(names), tuple(self._stored(source, block).specs()), key=str(block[0]))

    def _stored(self, source: Source, block: tuple[int, ...]) -> StoredBlock:
        assert self.ranks is not None
        return StoredBlock(source, self.solver, block, self._atoms(len(block)), self.ranks)

    def apply(
        self, group: Group, tensors: Mapping[str, Tensor], statistics: Statistics, source: Source
    ) -> dict[str, Tensor]:
        """Return the projections that atoms and factors make, or these themselves, in the source's dtypes."""
        layers = next(block for block in self._blocks(source) if block[0] == int(group.key))
        held = {
            layer: {
                name: tensors[f"{source.layer_prefix(layer)}self_attn.{name}.weight"].double() for name in PROJECTIONS
            }
            for layer in layers
        }
        written: dict[str, Tensor] = {}
        for name in PROJECTIONS:
            shared = statistics.get(f"{name}-{layers[0]}", {})
            block = _block(name, layers, held, statistics)
            if self.export == "factors":
                written |= self._stored(source, layers).tensors(block, shared)
                continue
            for layer, weight in zip(layers, block.rebuilt(self.solver, shared, _ranks(statistics)), strict=True):
                written[f"{source.layer_prefix(layer)}self_attn.{name}.weight"] = weight
        if self.export == "factors":
            written |= self._stored(source, layers).kept(tensors)
        return {spec.name: written[spec.name].to(TORCH_DTYPES[spec.dtype]) for spec in group.writes}

    def edit_config(self, source: Source, statistics: Statistics) -> dict[str, Any]:
        """Return the source's config, or that of the portable model with the dictionary's shape."""
        if self.export == "dense":
            return dict(source.config)
        if self.ranks is None:
            return portable_config(source, {})
        blocks = self._blocks(source)
        how = {
            "solver": self.solver,
            "blocks": [block[0] for block in blocks],
            "atoms": [self._atoms(len(block)) for block in blocks],
            "ranks": {
                name: [self._stored(source, block).rank(name, layer) for block in blocks for layer in block]
                for name in PROJECTIONS
            },
        }
        return portable_config(source, {"weight_dictionary": how})

    def side_files(self, source: Source, statistics: Statistics) -> Iterator[tuple[str, bytes]]:
        """Yield the code of the portable model, where that is written."""
        if self.export == "factors":
            yield from code_files(source)

    def findings(self, statistics: Statistics) -> dict[str, Any]:
        """Return the ranks, and, of atoms, the energy that they capture beyond what norms explain."""
        if "ranks" not in statistics:
            return {}
        ranks: dict[str, dict[str, int | str]] = {}
        for name, rank in sorted(statistics["ranks"].items(), key=lambda item: int(item[0].rpartition(".")[2])):
            projection, _, layer = name.partition(".")
            ranks.setdefault(projection, {})[layer] = "whole" if int(rank) == _WHOLE else int(rank)
        found: dict[str, Any] = {"ranks": ranks}
        beyond = {name: self._beyond(name, statistics) for name in PROJECTIONS if self.solver in ("pca", "als")}
        if beyond:
            found["energy_beyond_norms"] = beyond
            if max(map(max, beyond.values())) < _NOTHING_SHARED:
                found["warning"] = "layers share no directions, only their norms differ: solver svd loses less"
        return found

    def _beyond(self, name: str, statistics: Statistics) -> list[float]:
        blocks = sorted((int(key.rpartition("-")[2]), key) for key in statistics if key.startswith(f"{name}-"))
        pairs = [statistics[key]["energy"].tolist() for _, key in blocks]
        return [float(f"{captured - expected:.4g}") for captured, expected in pairs] or [0.0]

    def engines(self, source: Source) -> dict[str, str]:
        """Whatever serves the source serves dense weights; factors are no linear layers that engines know."""
        if self.export == "dense":
            return dict.fromkeys(("transformers", "vllm", "sglang"), "yes, as the source")
        no = "no: it replaces linear layers by its own, and does not know factors"
        return {"transformers": "yes, with trust_remote_code=True", "vllm": no, "sglang": no}


def _ranks(statistics: Statistics) -> dict[str, int | None]:
    return {name: None if int(rank) == _WHOLE else int(rank) for name, rank in statistics["ranks"].items()}


def _block(
    name: str, layers: tuple[int, ...], held: Mapping[int, Mapping[str, Tensor]], statistics: Statistics
) -> Block:
    weights = torch.stack([held[layer][name] for layer in layers])
    seconds = torch.stack([second_of(name, statistics[f"moments-{layer}"]) for layer in layers])
    return Block(name, layers, weights, seconds)
