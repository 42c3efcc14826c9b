"""The step `attention_drop`: layers without attention, the baseline that sharing has to beat (arXiv 2406.15786)."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from reattend.calibration.search import rise
from reattend.convert.attention_sharing.checks import check_source, kinds_of
from reattend.convert.attention_sharing.selection import BUDGET, Limit, choose_dropped
from reattend.convert.attention_sharing.trials import Trials
from reattend.convert.portable.step import PortableStep
from reattend.errors import Refusal
from reattend.families.source import Source
from reattend.modeling.portable.configuration_reattend import wrong_sharing
from reattend.transform import Group, Passes, Statistics


class AttentionDrop(PortableStep):
    """Attention left out of layers, chosen by measured perplexity or given."""

    step: Literal["attention_drop"] = "attention_drop"
    count: int | None = Field(None, ge=1, strict=True, description="how many layers lose their attention")
    budget: float | None = Field(
        None, gt=0, strict=True, allow_inf_nan=False,
        description="as many as raise perplexity on the selection text by at most this share "
        f"[{BUDGET} where neither count nor layers are given]",
    )  # fmt: skip
    layers: tuple[int, ...] | None = Field(None, description="which layers, in the place of both")

    @model_validator(mode="after")
    def _check_one_way(self) -> "AttentionDrop":
        if sum(value is not None for value in (self.count, self.budget, self.layers)) > 1:
            raise ValueError("expected one of count, budget and layers")
        if self.layers is not None and not self.layers:
            raise ValueError("layers: is empty")
        return self

    @property
    def tolerance(self) -> float:
        """Relative L2 of logits: what looks broken is caught, no more; `eval` tells what was lost."""
        return 1.0

    @property
    def texts(self) -> tuple[str, ...]:
        """Layers are chosen on the selection text."""
        return () if self.layers is not None else ("selection",)

    @property
    def undecided(self) -> bool:
        """Whether the layers are still to be chosen."""
        return self.layers is None

    def settled(self, findings: Mapping[str, Any]) -> "AttentionDrop":
        """Return the step with the layers that were chosen."""
        if not self.undecided:
            return self
        return self.model_copy(update={"count": None, "budget": None, "layers": tuple(findings["layers"])})

    def check(self, source: Source) -> list[str]:
        """Refuse sources that can't leave attention out, and layers that have to keep it."""
        remarks = super().check(source)
        check_source(source, self.step)
        wrong = wrong_sharing(None, None if self.layers is None else list(self.layers), kinds_of(source))
        if wrong is not None:
            raise Refusal(f"attention_drop: layers: {wrong.partition(': ')[2]}")
        if self.count is not None and self.count >= source.num_layers:
            raise Refusal(f"attention_drop: count: {self.count}, the model has {source.num_layers} layers")
        each = sum(source.tensors[name].numel for name in _lost(source, 0))
        count = len(self.layers or ()) or self.count
        open_ = "" if self.layers else " (sizes are those with all: calibration decides which they are)"
        many = "layers" if count is None else f"{count} layers"
        return [*remarks, f"{many} without attention{open_}: each saves {each} parameters, and its cache"]

    def calibrate(self, source: Source, passes: Passes, statistics: Statistics) -> None:
        """Choose the layers."""
        trials = Trials(passes, statistics, _no_maps, source.num_kv_heads)
        chosen, losses = choose_dropped(trials, kinds_of(source), Limit(self.count, self.budget))
        statistics["chosen"] = {
            "layers": torch.tensor(sorted(chosen.dropped)),
            "losses": torch.tensor(losses, dtype=torch.float64),
        }

    def statistics_bytes(self, source: Source) -> int:
        """Losses in files of a block each, and the code."""
        return super().statistics_bytes(source) + 4096 * 8 * source.num_layers

    def parts(self, source: Source, statistics: Statistics) -> dict[str, Any]:
        """Return the config's key."""
        return {"attention_drop": sorted(self.layers)} if self.layers else {}

    def groups(self, source: Source) -> Iterator[Group]:
        """Yield each layer's attention and the norm before it, of which nothing stays."""
        for layer in sorted(self.layers or ()):
            yield Group(_lost(source, layer), (), key=str(layer))

    def apply(
        self, group: Group, tensors: Mapping[str, Tensor], statistics: Statistics, source: Source
    ) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def findings(self, statistics: Statistics) -> dict[str, Any]:
        """Return the layers, and the perplexities that chose them."""
        if "chosen" not in statistics:
            return {}
        chosen = statistics["chosen"]
        losses = chosen["losses"].tolist()
        return {
            "layers": chosen["layers"].tolist(),
            "selection_perplexity": [float(f"{value:.6g}") for value in chosen["losses"].exp().tolist()],
            "selection_rise": float(f"{rise(losses[-1], losses[0]):.6g}"),
        }


def _lost(source: Source, layer: int) -> tuple[str, ...]:
    """Return the tensors of a layer's attention and of the norm before it."""
    prefix = source.layer_prefix(layer)
    return tuple(n for n in source.tensors if n.startswith((f"{prefix}self_attn.", f"{prefix}input_layernorm.")))


def _no_maps(layer: int, leader: int) -> Tensor:
    raise AssertionError("nothing follows")
