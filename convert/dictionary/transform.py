"""The step `dictionary`: attention weights from parts that layers share and low-rank factors."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from reattend.calibration.divided import any_missing, missing
from reattend.checkpoint.tensors import TORCH_DTYPES
from reattend.convert.dictionary.checks import check_source
from reattend.convert.dictionary.dividing import Budget, atoms_for, block_of, divide, findings_in, ranks_in, shared_in
from reattend.convert.dictionary.grouping import found_blocks, mean_state
from reattend.convert.dictionary.moments import PROJECTIONS, gather_moments
from reattend.convert.dictionary.solving import Solver
from reattend.convert.dictionary.storing import StoredBlock
from reattend.convert.portable.form import check_portable, code_files, portable_config
from reattend.errors import DeadEndError, Refusal
from reattend.families.source import Source
from reattend.transform import Group, Passes, Statistics

_Number = Annotated[int, Field(strict=True)]


class Dictionary(BaseModel):
    """Weight dictionaries across layers (MASA), Basis Sharing, SVD-LLM: attention weights from fewer numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: Literal["dictionary"] = "dictionary"
    reduction: float = Field(0.2, gt=0, lt=1, strict=True, description="share of the attention weights removed")
    solver: Solver = Field(
        "svd", description="svd: factors per matrix; basis: one basis for a block; pca, als: atoms and factors"
    )
    blocks: _Number | tuple[_Number, ...] | Literal["kl"] | None = Field(
        None,
        description="layers per block (svd: 1, basis: 2, pca, als: 5), the first layer of each, or kl: found",
    )
    atom_share: float = Field(
        0.5,
        ge=0,
        le=1,
        strict=True,
        description="share of the numbers kept that atoms take: pca; als, where it has any",
    )

    export: Literal["dense", "factors"] = Field(
        "dense", description="dense: the source's format; factors: as few numbers as are kept, in the portable model"
    )
    ranks: dict[str, dict[int, int | Literal["whole"]]] | None = Field(
        None, description="export: factors: the ranks that calibration divided, as `reattend.json` lists them"
    )
    atoms: dict[str, dict[int, _Number]] | None = Field(
        None,
        description="als, with ranks: how many atoms, by each block's first layer, as `reattend.json` lists them",
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
        """Whether calibration decides which shapes are written, or what is written together."""
        return self.blocks == "kl" or (self.export == "factors" and self.ranks is None)

    def settled(self, findings: Mapping[str, Any]) -> "Dictionary":
        """Return the step with the blocks, the ranks and, for `als`, the atoms that were found."""
        found: dict[str, Any] = {"blocks": tuple(findings["blocks"])} if self.blocks == "kl" else {}
        if self.export == "factors" and self.ranks is None:
            keys = ("ranks", "atoms") if self.solver == "als" else ("ranks",)
            found |= {key: _by_layer(findings[key]) for key in keys}
        return self.model_copy(update=found)

    def check(self, source: Source) -> list[str]:
        """Refuse sources whose projections can't be factored, and blocks that don't fit."""
        check_source(source)
        if self.blocks == "kl" and (self.solver == "svd" or self.ranks is not None):
            raise Refusal(f"dictionary: blocks: kl: goes with no {'given ranks' if self.ranks else 'solver svd'}")
        blocks = self._blocks(source)
        attention = self._numbers(source)
        kept, atoms = int((1 - self.reduction) * attention), self._most_shared(source)
        if self.solver == "pca" and atoms > kept:
            raise Refusal(f"dictionary: atom_share: atoms take {atoms} numbers of {kept}; lower it")
        if self.atoms is not None and (self.ranks is None or self.solver != "als"):
            raise Refusal("dictionary: atoms: go with solver als and given ranks")
        if self.ranks is not None:
            self._check_ranks(source, self.ranks)
        held = "the output holds them dense, in the source's format: as large and as fast as before"
        if self.export == "factors":
            check_portable(source, self.step)
            held = "the output holds them alone, in the portable model"
            held += (
                "; sizes are those of the source: calibration decides which they are" if self.ranks is None else ""
            )
        remarks = [f"attention weights are made from {kept} numbers, before {attention}; {held}"]
        if self.solver in ("pca", "als"):
            count = sum(self._most_atoms(len(block)) for block in blocks)
            least = "up to " if self.solver == "als" else ""
            remarks.append(f"{least}{count} atoms per projection in {len(blocks)} blocks")
        return remarks

    def _check_ranks(self, source: Source, ranks: Mapping[str, Mapping[int, int | str]]) -> None:
        if self.export == "dense":
            raise Refusal("dictionary: ranks: do nothing with export: dense")
        self._check_atoms(source)
        for block in self._blocks(source):
            for name in PROJECTIONS:
                for layer in block[:1] if self.solver == "basis" and name != "o_proj" else block:
                    shape = source.tensors[f"{source.layer_prefix(layer)}self_attn.{name}.weight"].shape
                    rank = ranks.get(name, {}).get(layer)
                    whole = rank == "whole" and not self._atoms(name, block)
                    if not whole and not (isinstance(rank, int) and 1 <= rank <= min(shape)):
                        raise Refusal(
                            f"dictionary: ranks: {name}: {layer}: {rank!r}, expected 1 to {min(shape)}, or whole"
                        )

    def _check_atoms(self, source: Source) -> None:
        sizes = {block[0]: len(block) for block in self._blocks(source)}
        for name, row in (self.atoms or {}).items():
            if name not in PROJECTIONS or any(not 0 <= count <= sizes.get(i, -1) for i, count in row.items()):
                raise Refusal(f"dictionary: atoms: {name}: {row}, expected 0 to a block's layers by its first one")

    def _blocks(self, source: Source) -> list[tuple[int, ...]]:
        layers, given = source.num_layers, self.blocks
        if isinstance(given, tuple):
            if not given or given[0] != 0 or list(given) != sorted(set(given)) or given[-1] >= layers:
                raise Refusal(f"dictionary: blocks: expected rising layers from 0 to below {layers}")
            return [tuple(range(a, b)) for a, b in zip(given, (*given[1:], layers), strict=True)]
        if given == "kl":  # before they are found: as long as they may be, for the sizes
            return [tuple(range(a, min(a + 2 * self._size, layers))) for a in range(0, layers, 2 * self._size)]
        size = self._size if given is None else given
        if not 1 <= size <= layers:
            raise Refusal(f"dictionary: blocks: {size}, expected 1 to {layers} layers")
        return [tuple(range(a, min(a + size, layers))) for a in range(0, layers, size)]

    @property
    def _size(self) -> int:
        return {"svd": 1, "basis": 2}.get(self.solver, 5)

    def _most_atoms(self, layers: int) -> int:
        """The atoms of a block of `pca`, and the most that `als` tries."""
        kept = {"pca": 1 - self.reduction, "als": 1.0}.get(self.solver, 0.0)
        return atoms_for(layers, kept * self.atom_share)

    def _atoms(self, name: str, block: tuple[int, ...]) -> int:
        """How many a projection has that is stored as factors."""
        if self.solver == "als":
            return (self.atoms or {}).get(name, {}).get(block[0], 0)
        return self._most_atoms(len(block))

    def _numbers(self, source: Source) -> int:
        return sum(
            source.tensors[f"{source.layer_prefix(layer)}self_attn.{name}.weight"].numel
            for layer in range(source.num_layers)
            for name in PROJECTIONS
        )

    def calibrate(self, source: Source, passes: Passes, statistics: Statistics) -> None:
        """Find blocks; gather moments; measure how errors weigh; find atoms; divide numbers among the matrices."""
        layers = range(source.num_layers)
        unknown = self.blocks == "kl" and "blocks" not in statistics
        if any_missing(statistics, (f"moments-{i}" for i in layers)) or unknown:
            fed = []  # to each layer but the first: the mean of what the one before put out
            for layer in passes("calibration"):
                fed += [mean_state(layer)] if unknown and layer.index else []
                if missing(statistics, f"moments-{layer.index}"):
                    statistics[f"moments-{layer.index}"] = gather_moments(layer)
            if unknown:
                logits_LV = passes.logits(torch.stack([*fed, mean_state(layer)]))
                statistics["blocks"] = found_blocks(logits_LV, self._size)
        names = (f"sensitivity-{i}" for i in layers)
        if any_missing(statistics, names) or "atoms" not in statistics:
            try:
                divide(self._grouped(statistics)._budget(source), passes, statistics)
            except ValueError as error:
                raise DeadEndError(f"dictionary: reduction: {self.reduction} can't be reached: {error}") from error

    def _grouped(self, statistics: Statistics) -> "Dictionary":
        """Return the step with the blocks that were found."""
        if self.blocks != "kl":
            return self
        return self.model_copy(update={"blocks": tuple(statistics["blocks"]["first"].tolist())})

    def _budget(self, source: Source) -> Budget:
        kept = 1 - self.reduction
        numbers = int(kept * self._numbers(source))
        return Budget(self.solver, tuple(self._blocks(source)), kept, numbers, self.atom_share)

    def _most_shared(self, source: Source) -> int:
        """The most numbers that atoms and coefficients take."""
        total = 0
        for block in self._blocks(source):
            atoms = self._most_atoms(len(block))
            for name in PROJECTIONS:
                size = source.tensors[f"{source.layer_prefix(block[0])}self_attn.{name}.weight"].numel
                total += atoms * (size + len(block))
        return total

    def statistics_bytes(self, source: Source) -> int:
        """Moments in fp64, atoms, and small files."""
        hidden, output = source.size("hidden"), source.size("q")
        moments = 8 * (2 * hidden**2 + output**2) * source.num_layers
        moments += 1 << 17 if self.export == "factors" else 0  # the code
        return moments + 8 * self._most_shared(source) + (1 << 14) * (source.num_layers + 1)

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
        atoms = {name: self._atoms(name, block) for name in PROJECTIONS}
        return StoredBlock(source, self.solver, block, atoms, self.ranks)

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
            shared = shared_in(statistics, f"{name}-{layers[0]}")
            block = block_of(name, layers, held, statistics)
            if self.export == "factors":
                written |= self._stored(source, layers).tensors(block, shared)
                continue
            for layer, weight in zip(layers, block.rebuilt(self.solver, shared, ranks_in(statistics)), strict=True):
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
            "atoms": {name: [self._atoms(name, block) for block in blocks] for name in PROJECTIONS},
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
        """Return the ranks and atoms, and the energy that atoms capture beyond what norms explain."""
        if "atoms" not in statistics:
            return {}
        found = findings_in(statistics, self.solver)
        if "blocks" in statistics:
            found["blocks"] = statistics["blocks"]["first"].tolist()
            found["drift"] = [float(f"{value:.4g}") for value in statistics["blocks"]["drift"].tolist()]
        return found

    def engines(self, source: Source) -> dict[str, str]:
        """Whatever serves the source serves dense weights; factors are no linear layers that engines know."""
        if self.export == "dense":
            return dict.fromkeys(("transformers", "vllm", "sglang"), "yes, as the source")
        no = "no: it replaces linear layers by its own, and does not know factors"
        return {"transformers": "yes, with trust_remote_code=True", "vllm": no, "sglang": no}


def _by_layer(found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[int, Any]]:
    return {name: {int(layer): value for layer, value in row.items()} for name, row in found.items()}
