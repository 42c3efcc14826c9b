"""The forms that a converted model is written in: stock `deepseek_v3`, or our portable model with latent attention.

The portable form holds what the native one can't: q/k norms, windows, MLP biases, frequencies and a rank per layer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from reattend.calibration.layerwise import LayerPass
from reattend.checkpoint.header import TensorSpec
from reattend.convert.mla.attention import LatentAttention
from reattend.convert.mla.calibration import own_slots, slots_of_all
from reattend.convert.mla.checks import BIASES, READ, check_native, check_portable_source, check_vllm
from reattend.convert.mla.geometry import (
    Geometry,
    attention_name,
    empty_layer,
    native_specs,
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
from reattend.convert.mla.portable import latent_config, portable_geometry, portable_layer, portable_specs
from reattend.convert.mla.statistics import LayerMoments
from reattend.convert.portable.form import code_files
from reattend.families.source import Source
from reattend.transform import Group


class Form(Protocol):
    """How converted layers are stored, and what the config says of them."""

    def check(self, source: Source) -> list[str]:
        """Refuse a source that the form can't hold; return remarks."""

    def geometry(self, source: Source) -> Geometry:
        """Return the sizes of a source that was checked."""

    @property
    def biased(self) -> bool:
        """Whether the output has biases: they hold the values' mean, and the source's own."""

    def slots(self, layers: Iterator[LayerMoments], geometry: Geometry) -> tuple[Tensor, Tensor]:
        """Return every layer's list of source frequencies and its components there, (Y, S) both."""

    def reads(self, source: Source, layer: int) -> tuple[str, ...]:
        """Return the tensors of a layer that converted ones replace."""

    def specs(self, source: Source, rank: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a converted layer's `self_attn` by short names."""

    def tensors(self, source: Source, layer: LayerPass, attention: LatentAttention) -> dict[str, Tensor]:
        """Return the tensors of `specs`, as wide as they are to be kept."""

    def other_groups(self, source: Source) -> Iterator[Group]:
        """Yield what is copied beside the layers."""

    def config(self, source: Source, ranks: Sequence[int], pairs_YS: Tensor | None) -> dict[str, Any]:
        """Return the result's config; while planning there are no pairs."""

    def files(self, source: Source) -> Iterator[tuple[str, bytes]]:
        """Yield files beside the weights."""

    def engines(self) -> dict[str, str]:
        """Say which engines can serve the result."""


@dataclass(frozen=True)
class NativeForm:
    """Stock `deepseek_v3` as `target`'s class reads it."""

    target: str
    rope_dim: int
    query_rank: int | None

    def check(self, source: Source) -> list[str]:
        """See `Form`."""
        check_native(source)
        if self.target == "vllm":
            check_vllm(source, read_geometry(source), self.rope_dim)
        remarks = ["the output embedding is untied, as vLLM needs it"] if self._unties(source) else []
        return [*remarks, "per-tensor fp8 scales would flush the latent rows: quantise them per row"]

    def geometry(self, source: Source) -> Geometry:
        """See `Form`."""
        return read_geometry(source)

    @property
    def biased(self) -> bool:
        """See `Form`."""
        return TARGETS[self.target].biases

    def slots(self, layers: Iterator[LayerMoments], geometry: Geometry) -> tuple[Tensor, Tensor]:
        """One list for all layers; where the target has default RoPE only, every n-th frequency of the source."""
        fixed = None
        if not TARGETS[self.target].any_frequencies:
            fixed = torch.arange(0, geometry.head_dim // 2, geometry.head_dim // self.rope_dim)
        pair_S, kept_YS = slots_of_all(layers, geometry, self.rope_dim // 2, fixed)
        return pair_S.expand(len(kept_YS), -1), kept_YS

    def reads(self, source: Source, layer: int) -> tuple[str, ...]:
        """See `Form`."""
        return _present(source, layer, (*READ, *BIASES))

    def specs(self, source: Source, rank: int) -> dict[str, tuple[int, ...]]:
        """See `Form`."""
        geometry = read_geometry(source)
        queries = query_latent(geometry, self.query_rank)
        return native_specs(geometry, self.rope_dim, rank, biased=self.biased, queries=queries)

    def tensors(self, source: Source, layer: LayerPass, attention: LatentAttention) -> dict[str, Tensor]:
        """See `Form`."""
        norm_E = layer.module.get_parameter("input_layernorm.weight").detach().cpu()
        eps = TARGETS[self.target].eps(float(source.get("rms_norm_eps") or 1e-6))
        narrow = source.tensors[attention_name(source, layer.index, "q_proj.weight")].dtype == "F16"
        queries = query_latent(read_geometry(source), self.query_rank)
        return native_layer(
            attention, norm_E, eps, biased=self.biased, queries=queries,
            relative_error=FP16_ERROR if narrow else WIDE_RANGE_ERROR,
        )  # fmt: skip

    def _unties(self, source: Source) -> bool:
        return source.tied and not TARGETS[self.target].tied_head

    def other_groups(self, source: Source) -> Iterator[Group]:
        """Yield the embedding where the head has to be untied."""
        if self._unties(source):
            embedding = source.tensors[f"{source.prefix}{source.family.embedding}.weight"]
            head = TensorSpec("lm_head.weight", embedding.dtype, embedding.shape)
            yield Group((embedding.name,), (embedding, head))

    def config(self, source: Source, ranks: Sequence[int], pairs_YS: Tensor | None) -> dict[str, Any]:
        """Return a deepseek_v3 config with all layers dense."""
        geometry = read_geometry(source)
        rope: Mapping[str, Any] = {"rope_type": "default", "rope_theta": geometry.theta}
        if pairs_YS is not None:
            rope = native_rope(geometry.rotary.pick(pairs_YS[0]), geometry.theta, geometry.max_positions)
        return native_config(
            source.config, empty_layer(geometry, self.rope_dim, ranks[0]), rope, biased=self.biased,
            queries=query_latent(geometry, self.query_rank), tied=source.tied and not self._unties(source),
        )  # fmt: skip

    def files(self, source: Source) -> Iterator[tuple[str, bytes]]:
        """Yield nothing: all is in the weights."""
        yield from ()

    def engines(self) -> dict[str, str]:
        """Stock classes read it; vLLM and SGLang only what their own deepseek_v3 holds."""
        if self.target == "transformers":
            no = "no: their deepseek_v3 has no biases and default RoPE only (target: vllm)"
            return {"transformers": "yes", "vllm": no, "sglang": no}
        return {"transformers": "no: its latent norms have another eps", "vllm": "yes, by its format", "sglang": "?"}


@dataclass(frozen=True)
class PortableForm:
    """Our portable model: each layer has its own frequencies, and may have its own rank."""

    rope_dim: int

    def check(self, source: Source) -> list[str]:
        """See `Form`."""
        check_portable_source(source)
        return ["the output holds code of its own: stock transformers loads it with trust_remote_code=True"]

    def geometry(self, source: Source) -> Geometry:
        """See `Form`."""
        return portable_geometry(source)

    @property
    def biased(self) -> bool:
        """See `Form`."""
        return True

    def slots(self, layers: Iterator[LayerMoments], geometry: Geometry) -> tuple[Tensor, Tensor]:
        """See `Form`."""
        return own_slots(layers, geometry, self.rope_dim // 2)

    def reads(self, source: Source, layer: int) -> tuple[str, ...]:
        """With q/k norms the projections stay, but for the last."""
        normed = "qk_norm" in source.family.features
        return _present(source, layer, ("o_proj.weight", "o_proj.bias") if normed else (*READ, *BIASES))

    def specs(self, source: Source, rank: int) -> dict[str, tuple[int, ...]]:
        """See `Form`."""
        return portable_specs(source, read_geometry(source), self.rope_dim, rank)

    def tensors(self, source: Source, layer: LayerPass, attention: LatentAttention) -> dict[str, Tensor]:
        """See `Form`."""
        output = source.tensors[attention_name(source, layer.index, "o_proj.weight")]
        geometry = read_geometry(source)
        made = portable_layer(attention, geometry.head_dim, biased=geometry.query_bias)
        return {
            name: value.to(torch.float64 if output.dtype == "F64" else torch.float32) for name, value in made.items()
        }

    def other_groups(self, source: Source) -> Iterator[Group]:
        """Yield nothing: all else is kept."""
        yield from ()

    def config(self, source: Source, ranks: Sequence[int], pairs_YS: Tensor | None) -> dict[str, Any]:
        """Return the portable config."""
        return latent_config(source, self.rope_dim, ranks, pairs_YS)

    def files(self, source: Source) -> Iterator[tuple[str, bytes]]:
        """Yield the code."""
        yield from code_files(source)

    def engines(self) -> dict[str, str]:
        """The plan adds who can't."""
        return {"transformers": "yes, with trust_remote_code=True"}


def _present(source: Source, layer: int, names: tuple[str, ...]) -> tuple[str, ...]:
    every = (attention_name(source, layer, name) for name in names)
    return tuple(name for name in every if name in source.tensors)
