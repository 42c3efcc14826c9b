"""The step `mla`: GQA to multi-head latent attention, written as stock `DeepseekV3ForCausalLM` reads it."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from reattend.calibration.layerwise import LayerPass
from reattend.checkpoint.header import TensorSpec
from reattend.checkpoint.tensors import TORCH_DTYPES
from reattend.convert.mla.attention import LatentAttention
from reattend.convert.mla.budget import RANK_STEP, decide_rank, largest_rank, rank_findings, rank_within
from reattend.convert.mla.calibration import (
    MOMENT_WINDOWS,
    Conversion,
    convert,
    errors_per_layer,
    gather_moments,
    read_moments,
    slots_of_all,
)
from reattend.convert.mla.checks import BIASES, READ, check_source, check_vllm
from reattend.convert.mla.geometry import (
    Geometry,
    attention_name,
    empty_layer,
    native_specs,
    native_tensor_specs,
    query_latent,
    read_geometry,
)
from reattend.convert.mla.native import (
    FP16_ERROR,
    TARGETS,
    WIDE_RANGE_ERROR,
    native_config,
    native_layer,
    native_rope,
)
from reattend.convert.mla.prefix import Prefix, read_attention, stored_attention
from reattend.convert.mla.refit import Schedule
from reattend.errors import Refusal
from reattend.families.attention_kinds import KEY
from reattend.families.source import Source
from reattend.transform import Group, Passes, Statistics


class Mla(BaseModel):
    """GQA to MLA. The cache then holds latent_rank + rope_dim numbers per token and layer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: Literal["mla"] = "mla"
    latent_rank: Annotated[int, Field(ge=1, strict=True)] | Literal["auto"] = Field(
        512, description="latent numbers per token (kernels know 512), or auto: what a budget allows"
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
    target: Literal["transformers", "vllm"] = Field("transformers", description="whose deepseek_v3 must hold it")
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
    def _biased(self) -> bool:
        """Whether the output has biases: they hold the values' mean, and the source's own."""
        return TARGETS[self.target].biases

    def check(self, source: Source) -> list[str]:
        """Refuse what the native format of the target can't hold, and sizes that make no sense."""
        check_source(source)
        geometry = read_geometry(source)
        self._check_sizes(geometry)
        if self.target == "vllm":
            check_vllm(source, geometry, self.rope_dim)
        return self._remarks(source, geometry)

    def _check_sizes(self, geometry: Geometry) -> None:
        width = geometry.kv_heads * geometry.head_dim
        if self.rope_dim > width:
            raise Refusal(f"mla: rope_dim: {self.rope_dim} is more than the {width} numbers that the keys have")
        rank, most = self._rank(geometry), largest_rank(geometry, self.rope_dim)
        if rank < 1:
            budget = "rope_dim" if self.cache_budget is None else f"cache_budget: {self.cache_budget}"
            raise Refusal(f"mla: {budget} leaves no {RANK_STEP} numbers beside rope_dim")
        if rank > most:
            raise Refusal(f"mla: latent_rank: {rank} is more than {most}: the cache would not shrink")
        widest = min(geometry.hidden, geometry.heads * (geometry.head_dim + self.rope_dim))
        if self.query_rank is not None and self.query_rank > widest:
            raise Refusal(f"mla: query_rank: {self.query_rank} is more than the {widest} that queries have")

    def _rank(self, geometry: Geometry) -> int:
        """Return latent_rank; auto is the largest that the budget allows, undecided the largest of all."""
        if isinstance(self.latent_rank, int):
            return self.latent_rank
        return rank_within(self.cache_budget or 1.0, geometry, self.rope_dim)

    def _remarks(self, source: Source, geometry: Geometry) -> list[str]:
        before = 2 * geometry.kv_heads * geometry.head_dim
        after = self._rank(geometry) + self.rope_dim
        remarks = [f"the cache holds {after} numbers per token and layer, before {before}"]
        if KEY in source.config:
            remarks.append(f"config.json's {KEY} goes: it was chosen for the attention that was")
        if self.undecided:
            remarks.append(f"sizes are those of latent_rank {self._rank(geometry)}, the largest: calibration decides")
        elif self.latent_rank == "auto":
            remarks.append(f"latent_rank is {self._rank(geometry)}, from sizes alone: its cost shows after the run")
        if self.target == "vllm" and source.tied:
            remarks.append("the output embedding is untied, as vLLM needs it")
        return [*remarks, "per-tensor fp8 scales would flush the latent rows: quantise them per row"]

    def calibrate(self, source: Source, passes: Passes, statistics: Statistics) -> None:
        """Gather moments in one pass, choose the frequency list, convert and refit layers in another."""
        geometry = read_geometry(source)
        layers = range(source.num_layers)
        if any(f"moments-{i}" not in statistics for i in layers):
            for layer in passes("calibration", windows=MOMENT_WINDOWS):
                tokens = layer.hidden["calibration"].shape[1]
                statistics[f"moments-{layer.index}"] = gather_moments(layer, geometry, tokens)
        every = (read_moments(statistics[f"moments-{i}"]) for i in layers)
        pair_S, kept_YS = slots_of_all(every, geometry, self.rope_dim // 2, self._fixed(geometry))
        statistics["model"] = {"pairs": pair_S}
        schedule = Schedule(self.refit_steps, self.refit_rate, windows=self.refit_windows) if self.refit else None
        how = Conversion(geometry, self._rank(geometry), self._biased, schedule, self.query_rank)
        if self.perplexity_budget is not None:
            how = replace(how, latent_rank=self._decided(passes, statistics, (pair_S, kept_YS), how))
            statistics["rank"] = {"latent_rank": torch.tensor(how.latent_rank)}
        self._convert_all(source, passes, statistics, (pair_S, kept_YS), how)

    def _convert_all(
        self, source: Source, passes: Passes, statistics: Statistics, slots: tuple[Tensor, Tensor], how: Conversion
    ) -> None:
        """Convert every layer; fitted layers in order, each behind those that were converted before."""
        pair_S, kept_YS = slots
        prefix: Prefix | None = None
        for layer in passes():
            i = layer.index
            if how.schedule is not None and prefix is None:
                prefix = Prefix(layer.hidden)
            if str(i) not in statistics:
                moments = read_moments(statistics[f"moments-{i}"])
                attention, errors = convert(layer, moments, (pair_S, kept_YS[i]), how, prefix)
                if prefix is not None:
                    statistics[f"attention-{i}"] = stored_attention(attention)
                statistics[str(i)] = self._native(source, layer, attention, how.geometry) | {
                    f"error.{name}": torch.tensor(value) for name, value in errors.items()
                }
            if prefix is not None:
                prefix.advance(layer, read_attention(statistics[f"attention-{i}"], how.geometry, pair_S))

    def _decided(self, passes: Passes, statistics: Statistics, slots: tuple[Tensor, Tensor], how: Conversion) -> int:
        """The rank that perplexity_budget allows."""
        pair_S, kept_YS = slots
        assert self.perplexity_budget is not None

        def closed_form(layer: LayerPass, rank: int) -> LatentAttention:
            moments = read_moments(statistics[f"moments-{layer.index}"])
            closed = replace(how, latent_rank=rank, schedule=None, query_rank=None)
            return convert(layer, moments, (pair_S, kept_YS[layer.index]), closed)[0]

        return decide_rank(passes, statistics, closed_form, how.latent_rank, self.perplexity_budget)

    def _fixed(self, geometry: Geometry) -> Tensor | None:
        """The list that the target prescribes: default RoPE of rope_dim numbers is every n-th of the source's."""
        if TARGETS[self.target].any_frequencies:
            return None
        return torch.arange(0, geometry.head_dim // 2, geometry.head_dim // self.rope_dim)

    def _native(
        self, source: Source, layer: LayerPass, attention: LatentAttention, geometry: Geometry
    ) -> dict[str, Tensor]:
        norm_E = layer.module.get_parameter("input_layernorm.weight").detach().cpu()
        eps = TARGETS[self.target].eps(float(source.get("rms_norm_eps") or 1e-6))
        narrow = source.tensors[attention_name(source, layer.index, "q_proj.weight")].dtype == "F16"
        return native_layer(
            attention, norm_E, eps, biased=self._biased, queries=query_latent(geometry, self.query_rank),
            relative_error=FP16_ERROR if narrow else WIDE_RANGE_ERROR,
        )  # fmt: skip

    def statistics_bytes(self, source: Source) -> int:
        """Moments, and the converted attention, in 64 bit."""
        geometry = read_geometry(source)
        width = 2 * geometry.kv_heads * geometry.head_dim
        moments = 2 * (width + 1) * width + geometry.heads * geometry.head_dim**2 + geometry.max_positions
        native = self._specs(geometry).values()
        layer = empty_layer(geometry, self.rope_dim, self._rank(geometry))
        attention = sum(tensor.numel() for tensor in layer.tensors().values()) + geometry.hidden  # and a bias
        fitted = attention // 2 if self.refit else 0  # in 32 bit
        return 8 * source.num_layers * (moments + fitted + sum(math.prod(shape) for shape in native))

    @property
    def undecided(self) -> bool:
        """Whether perplexity_budget is still to decide the rank."""
        return self.perplexity_budget is not None

    def settled(self, findings: Mapping[str, Any]) -> "Mla":
        """Return the step with the rank that was decided."""
        if not self.undecided:
            return self
        return self.model_copy(update={"latent_rank": findings["latent_rank"], "perplexity_budget": None})

    def _specs(self, geometry: Geometry) -> dict[str, tuple[int, ...]]:
        queries = query_latent(geometry, self.query_rank)
        return native_specs(geometry, self.rope_dim, self._rank(geometry), biased=self._biased, queries=queries)

    def groups(self, source: Source) -> Iterator[Group]:
        """Yield one group per layer's attention, and the embedding where the head has to be untied."""
        geometry = read_geometry(source)
        shapes = self._specs(geometry)
        for layer in range(source.num_layers):
            every = (attention_name(source, layer, name) for name in (*READ, *BIASES))
            reads = tuple(name for name in every if name in source.tensors)
            dtype = source.tensors[reads[0]].dtype
            yield Group(reads, native_tensor_specs(source, layer, shapes, dtype), key=str(layer))
        if self.target == "vllm" and source.tied:
            embedding = source.tensors[f"{source.prefix}{source.family.embedding}.weight"]
            head = TensorSpec("lm_head.weight", embedding.dtype, embedding.shape)
            yield Group((embedding.name,), (embedding, head))

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
        """Return a deepseek_v3 config with all layers dense."""
        geometry = read_geometry(source)
        rope: Mapping[str, Any] = {"rope_type": "default", "rope_theta": geometry.theta}
        if "model" in statistics:
            chosen = geometry.rotary.pick(statistics["model"]["pairs"])
            rope = native_rope(chosen, geometry.theta, geometry.max_positions)
        return native_config(
            source.config, empty_layer(geometry, self.rope_dim, self._rank(geometry)), rope, biased=self._biased,
            queries=query_latent(geometry, self.query_rank),
            tied=source.tied and TARGETS[self.target].tied_head,
        )  # fmt: skip

    def side_files(self, source: Source, statistics: Statistics) -> Iterator[tuple[str, bytes]]:
        """Yield nothing: all is in the weights."""
        yield from ()

    def findings(self, statistics: Statistics) -> dict[str, Any]:
        """Return each layer's relative error on the selection text, before and after the refit; the pairs kept."""
        errors = errors_per_layer(statistics)
        found = {"relative_error_per_layer": errors, "rope_pairs": statistics["model"]["pairs"].tolist()}
        return found | (rank_findings(statistics) if "rank" in statistics else {})

    def engines(self, source: Source) -> dict[str, str]:
        """Stock classes read it; vLLM and SGLang only what their own deepseek_v3 holds."""
        if self.target == "transformers":
            no = "no: their deepseek_v3 has no biases and default RoPE only (target: vllm)"
            return {"transformers": "yes", "vllm": no, "sglang": no}
        return {"transformers": "no: its latent norms have another eps", "vllm": "yes, by its format", "sglang": "?"}
