"""The step `clipped_softmax`: softmax that can put out exact zeros."""

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from reattend.calibration.attention_calls import observed_attention
from reattend.calibration.divided import any_missing, missing
from reattend.calibration.layerwise import LayerPass
from reattend.convert.clipped_softmax.formulas import gamma_of_length, gammas, mass_histogram
from reattend.convert.portable.step import PortableStep
from reattend.errors import Refusal
from reattend.families.attention_kinds import KEY
from reattend.families.source import Source
from reattend.kernels.attention import Options
from reattend.kernels.attention.reference import scores
from reattend.transform import Passes, Statistics, layers_of


class ClippedSoftmax(PortableStep):
    """Clipped softmax (Quantizable Transformers): gamma by a length, or per head by what it removes."""

    step: Literal["clipped_softmax"] = "clipped_softmax"
    alpha: float = Field(0.01, ge=0, le=1e6, strict=True, description="gamma = -alpha / length; 0: plain softmax")
    length: int = Field(
        1024, ge=1, le=2**31, strict=True, description="tokens that gamma is meant for; kept in the config"
    )
    zeta: float = Field(1.0, ge=1, le=1e6, strict=True, description="upper stretch; 1 suffices")
    epsilon: float | None = Field(
        None, gt=0, lt=1, strict=True,
        description="share of a head's weight that may be zeroed: gamma per head, chosen on the calibration text",
    )  # fmt: skip

    @model_validator(mode="after")
    def _check_one_way(self) -> "ClippedSoftmax":
        """A recipe as it was written out again names every key: what counts is another value than the default."""
        fields = type(self).model_fields
        defaults = (fields["alpha"].default, fields["length"].default)
        if self.epsilon is not None and (self.alpha, self.length) != defaults:
            raise ValueError("epsilon chooses gamma on the calibration text: leave out alpha and length")
        return self

    @property
    def tolerance(self) -> float:
        """Relative L2 of logits: gamma decides, so only what looks broken is caught."""
        return 1e-5 if self.epsilon is None and self.alpha == 0 and self.zeta == 1 else 0.5

    @property
    def texts(self) -> tuple[str, ...]:
        """Weights are looked at on the calibration text."""
        return () if self.epsilon is None else ("calibration",)

    def check(self, source: Source) -> list[str]:
        """Refuse a source whose softmax is clipped already, or quantised."""
        remarks = super().check(source)
        if source.config.get("clipped_softmax") is not None:
            raise Refusal("config.json: clipped_softmax: the source's softmax is clipped already")
        if KEY in source.config:
            raise Refusal(f"config.json: {KEY}: quantised attention does not clip; remove the key")
        if self.epsilon is None and self.alpha >= 1:
            fewest = -(-self.length // self.alpha)
            remarks.append(f"alpha {self.alpha}: a head that looks at {fewest:.0f} tokens or more alike is silenced")
        return [*remarks, "sdpa and eager compute weights in full: long prompts need memory for them"]

    def parts(self, source: Source, statistics: Statistics) -> dict[str, Any]:
        """Return the config's key; with `epsilon` gamma is known once calibration ran."""
        if self.epsilon is None:
            gamma = gamma_of_length(self.alpha, self.length)
            return {
                "clipped_softmax": {"zeta": self.zeta, "gamma": gamma, "alpha": self.alpha, "length": self.length}
            }
        chosen = [self._chosen(statistics, name)[0].tolist() for name in layers_of(statistics)]
        return {"clipped_softmax": {"zeta": self.zeta, "gamma": chosen or 0.0, "epsilon": self.epsilon}}

    def _chosen(self, statistics: Statistics, layer: str) -> tuple[Tensor, Tensor]:
        assert self.epsilon is not None
        return gammas(statistics[layer]["mass"], self.epsilon, self.zeta)

    def calibrate(self, source: Source, passes: Passes, statistics: Statistics) -> None:
        """Gather each head's histogram of weights, in one pass."""
        if not any_missing(statistics, map(str, range(source.num_layers))):
            return
        for layer in passes():
            if missing(statistics, str(layer.index)):
                statistics[str(layer.index)] = {"mass": _mass(layer)}

    def statistics_bytes(self, source: Source) -> int:
        """A histogram per head, and the code."""
        histograms = 8 * 320 * int(source.get("heads")) * source.num_layers if self.epsilon else 0
        return super().statistics_bytes(source) + histograms

    def findings(self, statistics: Statistics) -> dict[str, Any]:
        """Return each layer's gammas and the shares of weight that they zero."""
        chosen = [self._chosen(statistics, name) for name in layers_of(statistics)]
        if not chosen:
            return {}
        return {
            "gamma_per_layer": [_rounded(gamma) for gamma, _ in chosen],
            "removed_share_per_layer": [_rounded(removed) for _, removed in chosen],
        }

    def engines(self, source: Source) -> dict[str, str]:
        """Engines bring attention of their own."""
        no = "no: its attention does not clip softmax"
        return super().engines(source) | {"vllm": no, "sglang": no}


def _mass(layer: LayerPass) -> Tensor:
    total: list[Tensor] = []

    def observe(query: Tensor, key: Tensor, value: Tensor, options: Options) -> None:
        groups = key.shape[1]
        per = query.shape[1] // groups
        found = [
            mass_histogram(_weights(query[:, g * per : (g + 1) * per], key[:, g : g + 1], options))
            for g in range(groups)  # one key head at a time, for the memory
        ]
        every = torch.cat(found).cpu()
        total[:] = [every if not total else total[0] + every]

    with observed_attention(layer.module, observe):
        layer.run()
    return total[0]


def _weights(query_BPSD: Tensor, key_B1TD: Tensor, options: Options) -> Tensor:
    """Return softmax weights (P, B S, T), heads first."""
    dtype = torch.promote_types(query_BPSD.dtype, torch.float32)
    weight_BPST = torch.softmax(scores(query_BPSD, key_B1TD, options, dtype), -1)
    return weight_BPST.transpose(0, 1).flatten(1, 2)


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]
