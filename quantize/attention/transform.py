"""The step `int8_attention`: which layers run quantised attention, decided by what it does to their output.

No weight changes. The choice is written into `config.json`; `load()` honours it, and engines that don't know the key
run exact attention.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from reattend.calibration.attention_calls import observed_attention
from reattend.calibration.divided import any_missing, missing
from reattend.calibration.layerwise import LayerPass
from reattend.errors import Refusal
from reattend.families.attention_kinds import EXACT, INT8_FP8, INT8_FP16, KEY
from reattend.families.source import Source
from reattend.kernels.attention import Options, attention
from reattend.kernels.attention_int8 import Quantization, attention_int8
from reattend.quantize.attention.kinds import HOW
from reattend.quantize.attention.similarity import similarity, worst
from reattend.transform import Group, Passes, Statistics, layers_of

_WIDEST = 256  # head dim that the kernels take


class Int8Attention(BaseModel):
    """SageAttention-style attention in the layers where its output stays close enough to the exact one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: Literal["int8_attention"] = "int8_attention"
    threshold: float = Field(
        0.998, gt=0, le=1, strict=True, description="least cosine between a layer's output and the exact one"
    )
    fp8_threshold: float = Field(
        0.9995, gt=0, le=1, strict=True, description="the same for products with the values in e4m3"
    )
    values: Literal["auto", "fp16"] = Field(
        "auto", description="auto: e4m3 products with the values where they reach fp8_threshold; fp16: never"
    )

    @property
    def tolerance(self) -> float:
        """Stock transformers runs the output exactly as the source."""
        return 0.0

    @property
    def texts(self) -> tuple[str, ...]:
        """Similarities are measured on the calibration text."""
        return ("calibration",)

    def check(self, source: Source) -> list[str]:
        """Refuse attention that quantised kernels don't compute."""
        for feature, reason in _REFUSED.items():
            if feature in source.family.features:
                raise Refusal(f"int8_attention: {source.family.model_type} {reason}")
        width = source.size("free+rope") if "latent" in source.family.features else source.head_dim
        if width > _WIDEST:
            raise Refusal(f"int8_attention: heads of {width} numbers are wider than {_WIDEST}")
        return ["weights stay as they are; config.json names the layers, and load() runs them so on a GPU"]

    def calibrate(self, source: Source, passes: Passes, statistics: Statistics) -> None:
        """Measure every kind's similarity in every layer, in one pass."""
        if not any_missing(statistics, map(str, range(source.num_layers))):
            return
        for layer in passes():
            if missing(statistics, str(layer.index)):
                statistics[str(layer.index)] = self._measured(layer)

    def _measured(self, layer: LayerPass) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {kind: [] for kind in self._kinds}

        def observe(query: Tensor, key: Tensor, value: Tensor, options: Options) -> None:
            exact = attention(query, key, value, options, backend="torch")
            for kind, how in self._kinds.items():
                ours = attention_int8(query, key, value, options, how, backend="reference")
                found[kind].append(similarity(ours, exact))

        with observed_attention(layer.module, observe):
            layer.run()
        # A layer without attention has nothing to compare, and nothing to quantise.
        return {kind: worst(values) if values else torch.full((2,), torch.nan) for kind, values in found.items()}

    @property
    def _kinds(self) -> dict[str, Quantization]:
        """The quantised kinds that may be chosen, the fastest first."""
        return {kind: how for kind, how in HOW.items() if self.values == "auto" or kind == INT8_FP16}

    def _chosen(self, statistics: Statistics) -> list[str]:
        return [self._kind(statistics[name]) for name in layers_of(statistics)]

    def _kind(self, measured: Mapping[str, Tensor]) -> str:
        limits = {INT8_FP8: self.fp8_threshold, INT8_FP16: self.threshold}
        good = (kind for kind in self._kinds if float(measured[kind][0]) >= limits[kind])
        return next(good, EXACT)

    def statistics_bytes(self, source: Source) -> int:
        """A few numbers per layer, in files of one block each."""
        return 4096 * source.num_layers

    @property
    def undecided(self) -> bool:
        """What is written to the weights does not depend on the choice."""
        return False

    def settled(self, findings: Mapping[str, Any]) -> "Int8Attention":
        """Return the step."""
        return self

    def groups(self, source: Source) -> Iterator[Group]:
        """Yield nothing: every tensor is kept."""
        yield from ()

    def apply(
        self, group: Group, tensors: Mapping[str, Tensor], statistics: Statistics, source: Source
    ) -> dict[str, Tensor]:
        """Raise: there are no groups."""
        raise AssertionError(group)

    def edit_config(self, source: Source, statistics: Statistics) -> dict[str, Any]:
        """Return the config with each layer's kind; until they are known, exact."""
        chosen = self._chosen(statistics) if statistics else [EXACT] * source.num_layers
        return {**source.config, KEY: chosen}

    def side_files(self, source: Source, statistics: Statistics) -> Iterator[tuple[str, bytes]]:
        """Yield nothing."""
        yield from ()

    def findings(self, statistics: Statistics) -> dict[str, Any]:
        """Return each layer's kind, and by kind its cosine and relative L1 distance in the worst window."""
        measured = [statistics[name] for name in layers_of(statistics)]
        table = {kind: torch.stack([layer[kind] for layer in measured]) for kind in self._kinds}
        return {
            "kinds": self._chosen(statistics),
            "cosine_per_layer": {kind: _rounded(values[:, 0]) for kind, values in table.items()},
            "relative_l1_per_layer": {kind: _rounded(values[:, 1]) for kind, values in table.items()},
        }

    def engines(self, source: Source) -> dict[str, str]:
        """Other engines read the weights and leave the key alone."""
        return dict.fromkeys(("transformers", "vllm", "sglang"), "yes, with exact attention")


_REFUSED = {
    "clipped_softmax": "clips its softmax, which quantised attention does not compute",
    "soft_cap": "has soft-capped scores, which quantised attention does not compute",
    "encoder": "is an encoder, and its attention is not causal",
}


def _rounded(values: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else float(f"{value:.6g}") for value in values.tolist()]
