"""The step `attention_sharing`: layers that attend with the queries and keys of an earlier one."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from reattend.calibration.divided import any_missing, missing, undivided
from reattend.calibration.fitting import Schedule
from reattend.checkpoint.tensors import TORCH_DTYPES
from reattend.convert.attention_sharing.checks import check_source, kinds_of
from reattend.convert.attention_sharing.fitting import Prefix, fit_layer
from reattend.convert.attention_sharing.following import own_follower, read_follower
from reattend.convert.attention_sharing.formulas import best_map
from reattend.convert.attention_sharing.selection import BUDGET, REACH, Limit, choose_followers
from reattend.convert.attention_sharing.similarity import WINDOWS, Similarities
from reattend.convert.attention_sharing.trials import Trials
from reattend.convert.portable.step import PortableStep
from reattend.errors import Refusal
from reattend.families.source import Source
from reattend.modeling.portable.configuration_reattend import wrong_sharing
from reattend.transform import Group, Passes, Statistics, layers_of

_LOST = ("q_proj", "k_proj", "q_norm", "k_norm")


class AttentionSharing(PortableStep):
    """Attention shared between layers (EchoAtt): followers chosen by measured perplexity, mapped and fitted."""

    step: Literal["attention_sharing"] = "attention_sharing"
    followers: int | None = Field(None, ge=1, strict=True, description="how many layers follow another")
    budget: float | None = Field(
        None, gt=0, strict=True, allow_inf_nan=False,
        description="as many as raise perplexity on the selection text by at most this share, before they are "
        f"fitted [{BUDGET} where neither followers nor pairs are given]",
    )  # fmt: skip
    pairs: dict[int, int] | None = Field(None, description="the leader of each follower, in the place of both")
    refit: bool = Field(True, strict=True, description="fit followers' values and outputs to the source's layers")
    refit_steps: int = Field(24, ge=1, le=10_000, strict=True, description="steps on a follower's projections")
    refit_rate: float = Field(3e-3, gt=0, le=1, strict=True, description="relative size of a step")
    refit_windows: int = Field(2, ge=1, strict=True, description="windows in a step")

    @model_validator(mode="after")
    def _check_one_way(self) -> "AttentionSharing":
        if sum(value is not None for value in (self.followers, self.budget, self.pairs)) > 1:
            raise ValueError("expected one of followers, budget and pairs")
        if self.pairs is not None and not self.pairs:
            raise ValueError("pairs: is empty")
        return self

    @property
    def tolerance(self) -> float:
        """Relative L2 of logits: what looks broken is caught, no more; `eval` tells what was lost."""
        return 1.0

    @property
    def texts(self) -> tuple[str, ...]:
        """Heads are mapped and followers fitted on one text, chosen on the other."""
        return ("calibration", "selection")

    @property
    def undecided(self) -> bool:
        """Whether it is still to be chosen who follows whom."""
        return self.pairs is None

    def settled(self, findings: Mapping[str, Any]) -> "AttentionSharing":
        """Return the step with the pairs that were chosen."""
        if not self.undecided:
            return self
        pairs = {int(layer): leader for layer, leader in findings["pairs"].items()}
        return self.model_copy(update={"followers": None, "budget": None, "pairs": pairs})

    def check(self, source: Source) -> list[str]:
        """Refuse sources that can't share, and pairs that can't be."""
        remarks = super().check(source)
        check_source(source, self.step)
        wrong = wrong_sharing(self._leaders(source), None, kinds_of(source))
        if wrong is not None:
            raise Refusal(f"attention_sharing: pairs: {wrong.partition(': ')[2]}")
        if self.followers is not None and self.followers >= source.num_layers:
            raise Refusal(f"attention_sharing: followers: {self.followers}, the model has {source.num_layers} layers")
        return [
            *remarks,
            f"{self._saved(source)}, and half of its layer's cache",
            "a prompt costs a follower as much attention as before: what is saved are its q and k projections",
        ]

    def _saved(self, source: Source) -> str:
        lost = tuple(f"{source.layer_prefix(0)}self_attn.{name}" for name in _LOST)
        each = sum(spec.numel for name, spec in source.tensors.items() if name.startswith(lost))
        if self.pairs is not None:
            return f"{len(self.pairs)} followers: each saves {each} parameters"
        many = "followers" if self.followers is None else f"{self.followers} followers"
        return f"{many} (sizes are those without: calibration decides which they are): each saves {each} parameters"

    def _leaders(self, source: Source) -> list[int | None]:
        outside = [layer for layer in self.pairs or () if not 0 <= layer < source.num_layers]
        if outside:
            raise Refusal(f"attention_sharing: pairs: layer {outside[0]} is none of {source.num_layers}")
        return [(self.pairs or {}).get(layer) for layer in range(source.num_layers)]

    def calibrate(self, source: Source, passes: Passes, statistics: Statistics) -> None:
        """Map heads, choose followers, fit them."""
        layers = range(source.num_layers)
        if any_missing(statistics, (f"similarity-{i}" for i in layers)):
            similarities = Similarities(self._candidates(source))
            for layer in passes("calibration", windows=WINDOWS):
                similarities.take(layer)
                if missing(statistics, f"similarity-{layer.index}"):
                    statistics[f"similarity-{layer.index}"] = similarities.measure(layer.index)
        pairs = self.pairs or self._chosen(source, passes, statistics)
        own = undivided(statistics)  # each follower is fitted behind those before: that is one process's work
        if own is not None:
            self._fit_all(source, passes, own, pairs)

    def _candidates(self, source: Source) -> dict[int, list[int]]:
        """Return the leaders that each layer may have."""
        if self.pairs is not None:
            return {layer: [leader] for layer, leader in self.pairs.items()}
        return {layer: list(range(max(layer - REACH, 0), layer)) for layer in range(source.num_layers)}

    def _chosen(self, source: Source, passes: Passes, statistics: Statistics) -> dict[int, int]:
        def maps(layer: int, leader: int) -> Tensor:
            return self._map(source, statistics, layer, leader)

        trials = Trials(passes, statistics, maps, source.num_kv_heads)
        chosen, losses = choose_followers(trials, kinds_of(source), Limit(self.followers, self.budget))
        pairs = dict(sorted(chosen.leaders.items()))
        statistics["chosen"] = {
            "pairs": torch.tensor([[layer, leader] for layer, leader in pairs.items()]),
            "losses": torch.tensor(losses, dtype=torch.float64),
        }
        return pairs

    def _map(self, source: Source, statistics: Statistics, layer: int, leader: int) -> Tensor:
        return best_map(statistics[f"similarity-{layer}"][str(leader)][0], source.num_kv_heads)

    def _fit_all(self, source: Source, passes: Passes, statistics: Statistics, pairs: Mapping[int, int]) -> None:
        schedule = Schedule(self.refit_steps, self.refit_rate, windows=self.refit_windows)
        prefix: Prefix | None = None
        for layer in passes():
            i, follower = layer.index, None
            if prefix is None:
                prefix = Prefix(layer.hidden, pairs)
            if i in pairs:
                if str(i) not in statistics:
                    follower = own_follower(layer, source.num_kv_heads).folded(
                        self._map(source, statistics, i, pairs[i])
                    )
                    errors: Mapping[str, float] = {}
                    if self.refit:
                        fitted = fit_layer(layer, prefix, follower, schedule)
                        follower, errors = fitted.follower, fitted.errors
                    told = {f"error.{name}": torch.tensor(value) for name, value in errors.items()}
                    statistics[str(i)] = {**follower.tensors(), **told}
                follower = read_follower(statistics[str(i)], source.num_kv_heads)
            prefix.advance(layer, follower)

    def statistics_bytes(self, source: Source) -> int:
        """Followers in fp32, similarities, losses, and the code."""
        heads, layers = int(source.get("heads")), source.num_layers
        count = len(self.pairs or ()) or self.followers or layers
        projections = 4 * count * source.size("hidden") * source.size("q+kv")
        tables = 16 * heads**2 * layers * (REACH if self.pairs is None else layers)
        return super().statistics_bytes(source) + projections + tables + (1 << 14) * layers * (1 + (count or 1))

    def parts(self, source: Source, statistics: Statistics) -> dict[str, Any]:
        """Return the config's key."""
        return {"attention_sharing": self._leaders(source)} if self.pairs else {}

    def groups(self, source: Source) -> Iterator[Group]:
        """Yield each follower's attention, of which values and outputs stay."""
        for layer in sorted(self.pairs or ()):
            prefix = f"{source.layer_prefix(layer)}self_attn."
            names = [name for name in source.tensors if name.startswith(prefix)]
            kept = [name for name in names if name.removeprefix(prefix).partition(".")[0] not in _LOST]
            yield Group(tuple(names), tuple(source.tensors[name] for name in kept), key=str(layer))

    def apply(
        self, group: Group, tensors: Mapping[str, Tensor], statistics: Statistics, source: Source
    ) -> dict[str, Tensor]:
        """Return the follower's projections in the dtypes of the source's."""
        learned, prefix = statistics[group.key], f"{source.layer_prefix(group.key)}self_attn."
        return {
            spec.name: learned[spec.name.removeprefix(prefix)].to(TORCH_DTYPES[spec.dtype]) for spec in group.writes
        }

    def findings(self, statistics: Statistics) -> dict[str, Any]:
        """Return the pairs, the perplexities that chose them, and each follower's errors."""
        found: dict[str, Any] = {}
        if "chosen" in statistics:
            chosen = statistics["chosen"]
            found["pairs"] = {str(layer): leader for layer, leader in chosen["pairs"].tolist()}
            found["selection_perplexity"] = [_rounded(value) for value in chosen["losses"].exp().tolist()]
        errors = {layer: _errors(statistics[layer]) for layer in layers_of(statistics)}
        return found | ({"output_error": errors} if any(errors.values()) else {})

    def engines(self, source: Source) -> dict[str, str]:
        """Engines that bring a cache of their own keep keys in it for every layer."""
        again = "through its transformers backend, which caches followers' keys again; not run here"
        return super().engines(source) | {"vllm": again, "sglang": again}


def _errors(learned: Mapping[str, Tensor]) -> dict[str, float]:
    return {
        name.removeprefix("error."): _rounded(value) for name, value in learned.items() if name.startswith("error.")
    }


def _rounded(value: Any) -> float:
    return float(f"{float(value):.6g}")
