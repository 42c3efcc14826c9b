"""The step `mla`: GQA to multi-head latent attention, as stock `deepseek_v3` or in the portable form."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from reattend.calibration.divided import any_missing, missing, undivided
from reattend.calibration.fitting import Schedule
from reattend.calibration.layerwise import LayerPass
from reattend.checkpoint.header import TensorSpec
from reattend.checkpoint.tensors import TORCH_DTYPES
from reattend.convert.mla.attention import LatentAttention
from reattend.convert.mla.budget import (
    RANK_STEP,
    decide_rank,
    divide_ranks,
    largest_rank,
    rank_findings,
    rank_within,
)
from reattend.convert.mla.calibration import (
    MOMENT_WINDOWS,
    Conversion,
    convert,
    errors_at,
    errors_per_layer,
    gather_moments,
    read_moments,
    source_attention,
)
from reattend.convert.mla.forms import Form, NativeForm, PortableForm
from reattend.convert.mla.geometry import Geometry, attention_name, empty_layer
from reattend.convert.mla.prefix import Prefix, read_attention, stored_attention
from reattend.convert.mla.statistics import LayerMoments
from reattend.errors import Refusal
from reattend.families.attention_kinds import KEY
from reattend.families.source import Source
from reattend.transform import Group, Passes, Statistics

_Rank = Annotated[int, Field(ge=1, strict=True)]


class Mla(BaseModel):
    """GQA to MLA. The cache then holds latent_rank + rope_dim numbers per token and layer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: Literal["mla"] = "mla"
    latent_rank: _Rank | Annotated[tuple[_Rank, ...], Field(min_length=1)] | Literal["auto"] = Field(
        512, description="latent numbers per token (kernels know 512), one per layer (portable), or auto: by budget"
    )
    cache_budget: float | None = Field(
        None, gt=0, le=1, strict=True, description="with auto: most of the source's cache to keep"
    )
    perplexity_budget: float | None = Field(
        None, gt=0, strict=True, allow_inf_nan=False,
        description="with auto: relative rise of perplexity on the selection text before the refit that is allowed",
    )  # fmt: skip
    rope_dim: int = Field(
        64, ge=2, strict=True, multiple_of=2, description="rotary numbers per token (kernels know 64)"
    )
    query_rank: Annotated[int, Field(ge=1, strict=True)] | None = Field(
        None, description="directions of the input that queries depend on (q_lora_rank); none: all"
    )
    target: Literal["transformers", "vllm", "portable"] = Field(
        "transformers", description="whose deepseek_v3 must hold it, or portable: norms, windows, ranks per layer"
    )
    refit: bool = Field(
        True, strict=True, description="fit each layer to the source's attention output after the closed form"
    )
    refit_steps: int = Field(24, ge=1, strict=True, description="steps per layer")
    refit_rate: float = Field(
        3e-3, gt=0, strict=True, allow_inf_nan=False,
        description="relative change of a matrix per step, falling as a cosine",
    )  # fmt: skip
    refit_windows: int = Field(2, ge=1, strict=True, description="calibration windows per step")

    @model_validator(mode="after")
    def _check_budget(self) -> "Mla":
        budgets = (self.cache_budget is not None) + (self.perplexity_budget is not None)
        if budgets != (self.latent_rank == "auto"):
            raise ValueError("latent_rank: auto needs a cache_budget or a perplexity_budget, and either needs auto")
        if self.target != "portable" and isinstance(self.latent_rank, tuple):
            raise ValueError("latent_rank: the native format has one for all layers; target: portable holds a list")
        if self.target == "portable" and self.query_rank is not None:
            raise ValueError("query_rank: only the native format has a query latent; leave it out")
        return self

    @property
    def tolerance(self) -> float:
        """Relative L2 of logits: lossy by construction, so only what looks broken is caught."""
        return 0.7

    @property
    def texts(self) -> tuple[str, ...]:
        """Moments and the refit come from the calibration text, choices from the selection text."""
        return ("calibration", "selection")

    @property
    def _form(self) -> Form:
        if self.target == "portable":
            return PortableForm(self.rope_dim)
        return NativeForm(self.target, self.rope_dim, self.query_rank)

    def check(self, source: Source) -> list[str]:
        """Refuse what the form can't hold, and sizes that make no sense."""
        remarks = self._form.check(source)
        geometry = self._form.geometry(source)
        self._check_sizes(source, geometry)
        return [*self._remarks(source, geometry), *remarks]

    def _check_sizes(self, source: Source, geometry: Geometry) -> None:
        width = geometry.kv_heads * geometry.head_dim
        if self.rope_dim > width:
            raise Refusal(f"mla: rope_dim: {self.rope_dim} is more than the {width} numbers that the keys have")
        if isinstance(self.latent_rank, tuple) and len(self.latent_rank) != source.num_layers:
            raise Refusal(f"mla: latent_rank: {len(self.latent_rank)} ranks for {source.num_layers} layers")
        ranks, most = self._ranks(source, geometry), largest_rank(geometry, self.rope_dim)
        if min(ranks) < 1:
            budget = "rope_dim" if self.cache_budget is None else f"cache_budget: {self.cache_budget}"
            raise Refusal(f"mla: {budget} leaves no {RANK_STEP} numbers beside rope_dim")
        if max(ranks) > most:
            raise Refusal(f"mla: latent_rank: {max(ranks)} is more than {most}: the cache would not shrink")
        self._check_query_rank(geometry)

    def _check_query_rank(self, geometry: Geometry) -> None:
        widest = min(geometry.hidden, geometry.heads * (geometry.head_dim + self.rope_dim))
        if self.query_rank is not None and self.query_rank > widest:
            raise Refusal(f"mla: query_rank: {self.query_rank} is more than the {widest} that queries have")

    def _ranks(self, source: Source, geometry: Geometry) -> list[int]:
        """Return every layer's rank; auto is the largest that the budget allows, undecided the largest of all."""
        if isinstance(self.latent_rank, tuple):
            return list(self.latent_rank)
        return [self._rank(geometry)] * source.num_layers

    def _rank(self, geometry: Geometry) -> int:
        if isinstance(self.latent_rank, int):
            return self.latent_rank
        return rank_within(self.cache_budget or 1.0, geometry, self.rope_dim)

    def _remarks(self, source: Source, geometry: Geometry) -> list[str]:
        before = 2 * geometry.kv_heads * geometry.head_dim
        ranks = self._ranks(source, geometry)
        mean = sum(ranks) / len(ranks) + self.rope_dim
        on_average = " on average" if len(set(ranks)) > 1 else ""
        remarks = [f"the cache holds {mean:g} numbers per token and layer{on_average}, before {before}"]
        if KEY in source.config:
            remarks.append(f"config.json's {KEY} goes: it was chosen for the attention that was")
        if self.perplexity_budget is not None:
            remarks.append(f"sizes are those of latent_rank {max(ranks)}, the largest: calibration decides")
        elif self.undecided:
            remarks.append(f"calibration divides cache_budget among layers: {max(ranks)} is their mean latent_rank")
        elif self.latent_rank == "auto":
            remarks.append(f"latent_rank is {max(ranks)}, from sizes alone: its cost shows after the run")
        return remarks

    def calibrate(self, source: Source, passes: Passes, statistics: Statistics) -> None:
        """Gather moments in one pass, choose the frequency list, convert and refit layers in another."""
        geometry, form = self._form.geometry(source), self._form
        layers = range(source.num_layers)
        if any_missing(statistics, (f"moments-{i}" for i in layers)):
            for layer in passes("calibration", windows=MOMENT_WINDOWS):
                if missing(statistics, f"moments-{layer.index}"):
                    tokens = layer.hidden["calibration"].shape[1]
                    statistics[f"moments-{layer.index}"] = gather_moments(layer, geometry, tokens)
        every = (read_moments(statistics[f"moments-{i}"]) for i in layers)
        slots = form.slots(every, geometry)
        statistics["model"] = {"pairs": slots[0]}
        schedule = Schedule(self.refit_steps, self.refit_rate, windows=self.refit_windows) if self.refit else None
        ranks = self._ranks(source, geometry)
        how = Conversion(geometry, max(ranks), form.biased, schedule, self.query_rank)
        if self.undecided:
            found = self._decided(passes, statistics, slots, how)
            statistics["rank"] = {"latent_rank": torch.tensor(found)}
            ranks = found if isinstance(found, list) else [found] * len(ranks)
        # Each layer is fitted behind those before: that is one process's work.
        own = undivided(statistics) if self.refit else statistics
        if own is not None:
            self._convert_all(source, passes, own, slots, [replace(how, latent_rank=rank) for rank in ranks])

    def _convert_all(
        self,
        source: Source,
        passes: Passes,
        statistics: Statistics,
        slots: tuple[Tensor, Tensor],
        hows: list[Conversion],
    ) -> None:
        """Convert every layer; fitted layers in order, each behind those that were converted before."""
        pairs_YS, kept_YS = slots
        prefix: Prefix | None = None
        for layer in passes():
            i = layer.index
            if self.refit and prefix is None:
                prefix = Prefix(layer.hidden)
            if missing(statistics, str(i)):
                moments = read_moments(statistics[f"moments-{i}"])
                attention, errors = convert(layer, moments, (pairs_YS[i], kept_YS[i]), hows[i], prefix)
                if prefix is not None:
                    statistics[f"attention-{i}"] = stored_attention(attention)
                statistics[str(i)] = self._form.tensors(source, layer, attention) | {
                    f"error.{name}": torch.tensor(value) for name, value in errors.items()
                }
            if prefix is not None:
                own = source_attention(layer, hows[i].geometry)
                prefix.advance(layer, read_attention(statistics[f"attention-{i}"], own, pairs_YS[i]))

    def _decided(
        self, passes: Passes, statistics: Statistics, slots: tuple[Tensor, Tensor], how: Conversion
    ) -> int | list[int]:
        """The rank that perplexity_budget allows, or the ranks into which cache_budget is divided."""

        def with_moments(layer: LayerPass) -> tuple[LayerPass, LayerMoments, tuple[Tensor, Tensor]]:
            i = layer.index
            return layer, read_moments(statistics[f"moments-{i}"]), (slots[0][i], slots[1][i])

        def errors(layer: LayerPass, ranks: list[int]) -> Tensor:
            return errors_at(*with_moments(layer), how, ranks)

        def closed_form(layer: LayerPass, rank: int) -> LatentAttention:
            closed = replace(how, latent_rank=rank, schedule=None, query_rank=None)
            return convert(*with_moments(layer), closed)[0]

        if self.perplexity_budget is None:
            most = largest_rank(how.geometry, self.rope_dim)
            return divide_ranks(passes, statistics, errors, most, how.latent_rank)
        return decide_rank(passes, statistics, closed_form, how.latent_rank, self.perplexity_budget)

    def statistics_bytes(self, source: Source) -> int:
        """Moments, and the converted attention, in 64 bit."""
        geometry = self._form.geometry(source)
        width = 2 * geometry.kv_heads * geometry.head_dim
        moments = 2 * (width + 1) * width + geometry.heads * geometry.head_dim**2 + geometry.max_positions
        rank = max(self._ranks(source, geometry))
        written = self._form.specs(source, rank).values()
        layer = empty_layer(geometry, self.rope_dim, rank)
        attention = sum(tensor.numel() for tensor in layer.tensors().values()) + geometry.hidden  # and a bias
        fitted = attention // 2 if self.refit else 0  # in 32 bit
        return 8 * source.num_layers * (moments + fitted + sum(math.prod(shape) for shape in written))

    @property
    def undecided(self) -> bool:
        """Whether calibration is still to decide the rank: by perplexity_budget, or to divide cache_budget."""
        divided = self.latent_rank == "auto" and self.target == "portable"
        return self.perplexity_budget is not None or divided

    def settled(self, findings: Mapping[str, Any]) -> "Mla":
        """Return the step with the rank that was decided."""
        if not self.undecided:
            return self
        found = findings["latent_rank"]
        rank = tuple(found) if isinstance(found, list) else found
        return self.model_copy(update={"latent_rank": rank, "perplexity_budget": None, "cache_budget": None})

    def groups(self, source: Source) -> Iterator[Group]:
        """Yield one group per layer's attention, and what the form copies beside them."""
        for layer, rank in enumerate(self._ranks(source, self._form.geometry(source))):
            reads = self._form.reads(source, layer)
            dtype = source.tensors[reads[0]].dtype
            specs = self._form.specs(source, rank).items()
            writes = (TensorSpec(attention_name(source, layer, name), dtype, shape) for name, shape in specs)
            yield Group(reads, tuple(writes), key=str(layer))
        yield from self._form.other_groups(source)

    def apply(
        self, group: Group, tensors: Mapping[str, Tensor], statistics: Statistics, source: Source
    ) -> dict[str, Tensor]:
        """Return the converted layer in the source's dtype."""
        if not group.key:
            (embedding,) = tensors.values()
            return {spec.name: embedding for spec in group.writes}
        found = statistics[group.key]
        prefix = attention_name(source, int(group.key), "")
        return {
            spec.name: found[spec.name.removeprefix(prefix)].to(TORCH_DTYPES[spec.dtype]) for spec in group.writes
        }

    def edit_config(self, source: Source, statistics: Statistics) -> dict[str, Any]:
        """Return the config of the form."""
        pairs_YS = statistics["model"]["pairs"] if "model" in statistics else None
        return self._form.config(source, self._ranks(source, self._form.geometry(source)), pairs_YS)

    def side_files(self, source: Source, statistics: Statistics) -> Iterator[tuple[str, bytes]]:
        """Yield what the form needs beside the weights."""
        yield from self._form.files(source)

    def findings(self, statistics: Statistics) -> dict[str, Any]:
        """Return each layer's relative error on the selection text, before and after the refit; the pairs kept."""
        found: dict[str, Any] = {"relative_error_per_layer": errors_per_layer(statistics)}
        if self.target != "portable":  # there config.json names them, layer by layer
            found["rope_pairs"] = statistics["model"]["pairs"][0].tolist()
        return found | (rank_findings(statistics) if "rank" in statistics else {})

    def engines(self, source: Source) -> dict[str, str]:
        """Say which engines read the form."""
        return self._form.engines()
