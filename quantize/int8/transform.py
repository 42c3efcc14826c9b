"""The step `int8`: which tensors become codes and scales, and how each format names and declares them."""

import fnmatch
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from reattend.calibration.divided import any_missing, missing
from reattend.checkpoint.header import TensorSpec
from reattend.checkpoint.index import OUTLIERS
from reattend.errors import Refusal
from reattend.families.source import Source
from reattend.quantize.int8.calibration import MOST_COLUMNS, Learned, learn_layer
from reattend.quantize.int8.checks import (
    CALIBRATED,
    FLOATS,
    check_dtypes,
    check_selectors,
    check_smoothing,
    check_source,
)
from reattend.quantize.int8.findings import findings
from reattend.quantize.int8.formats import Format, document, engines, specs, unquantised
from reattend.quantize.int8.formats import tensors as layout_tensors
from reattend.quantize.int8.keeping import Keeping
from reattend.quantize.int8.migration import layer_tensors, migrate
from reattend.quantize.int8.side_files import choose_columns, layer_file
from reattend.quantize.int8.simulation import Simulation, codes_of
from reattend.transform import Group, Passes, Statistics


class Int8(BaseModel):
    """int8 weights. Selectors are shell patterns on module names."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: Literal["int8"] = "int8"
    format: Literal["compressed-tensors", "bitsandbytes"] = Field(
        "compressed-tensors", description="layout of the output"
    )
    activations: Literal["int8", "none"] = Field(
        "int8", description="int8: quantised per token at run time; none: left in 16 bit (W8A16)"
    )
    outliers: Literal["default", "none", "dynamic", "static", "smooth"] = Field(
        "default",
        description="dynamic: columns that reach `threshold` in a batch are multiplied in 16 bit (LLM.int8); "
        "static: columns that calibration chose are (needs a calibration text); "
        "smooth: outliers are moved into the weights (needs calibration and selection texts); "
        "default: dynamic in the format bitsandbytes, whose run time does that, else none",
    )
    threshold: float = Field(
        6.0, gt=0, strict=True, allow_inf_nan=False, description="magnitude from which a value is a dynamic outlier"
    )
    outlier_share: float = Field(
        0.05,
        gt=0,
        le=1,
        strict=True,
        description="numbers that static columns may add, per quantised weight",
    )
    rounding: Literal["nearest", "compensated"] = Field(
        "nearest", description="compensated: weights make up for each other's rounding (needs a calibration text)"
    )
    select: tuple[str, ...] = Field(("*",), description="linear layers to quantise")
    keep: Literal["auto"] | tuple[str, ...] = Field(
        (),
        description="linear layers to leave in 16 bit, or auto: the worst, as few as `keep_budget` allows (needs a "
        "selection text)",
    )
    keep_budget: float = Field(
        0.01,
        gt=0,
        strict=True,
        allow_inf_nan=False,
        description="with keep: auto: the relative rise of perplexity on the selection text that is allowed",
    )

    @model_validator(mode="after")
    def _check_budget(self) -> "Int8":
        if self.keep_budget != type(self).model_fields["keep_budget"].default and not self.undecided:
            raise ValueError("keep_budget does nothing without keep: auto")
        return self

    @property
    def tolerance(self) -> float:
        """Relative L2 of logits: int8 activations cost most, as a few of them are huge."""
        return 0.2 if self.activations == "int8" else 0.05

    def check(self, source: Source) -> list[str]:
        """Refuse quantised sources, Conv1D layers, non-float weights, and settings that fit nothing there."""
        self._check_settings()
        check_source(source)
        if self.undecided and "encoder" in source.family.features:
            name = source.family.model_type
            raise Refusal(f"int8: keep: auto: {name} is an encoder, perplexity is not defined for it")
        check_selectors((*self.select, *self._kept), source)
        modules = self._modules(source)
        if not modules:
            raise Refusal("int8: select and keep together leave no layer to quantise")
        check_dtypes((f"{module}.weight" for module in modules), source, FLOATS, "not a float")
        if self.mode == "static":
            names = (f"{module}.weight" for module in modules)
            check_dtypes(names, source, CALIBRATED, "calibrated from F32, F16 and BF16 only")
        if self.mode == "smooth":
            check_smoothing(source)
        for layer in range(source.num_layers if self._learns else 0):
            check_dtypes(
                self._layer_reads(source, layer), source, CALIBRATED, "calibrated from F32, F16 and BF16 only"
            )
        return self._remarks(source)

    def _check_settings(self) -> None:
        if self.activations == "none" and self.format == "bitsandbytes":
            raise Refusal("int8: activations: bitsandbytes always quantises them; use format: compressed-tensors")
        if self.activations == "none" and self.outliers not in ("default", "none"):
            raise Refusal(f"int8: outliers: {self.outliers} does nothing when activations are left in 16 bit")
        fields = type(self).model_fields
        for key, mode in (("threshold", "dynamic"), ("outlier_share", "static")):
            if getattr(self, key) != fields[key].default and self.mode != mode:
                raise Refusal(f"int8: {key}: does nothing with outliers: {self.mode}, only with {mode}")

    @property
    def mode(self) -> str:
        """How outliers are treated, the format's default resolved."""
        if self.outliers != "default":
            return self.outliers
        return "dynamic" if self.format == "bitsandbytes" else "none"

    def _remarks(self, source: Source) -> list[str]:
        remarks = [f"{source.family.head} is kept in 16 bit" + (" (tied)" if source.tied else "")]
        kept = len(source.linear_shapes) - len(self._modules(source))
        if kept:
            remarks.append(f"{kept} linear layers are kept by select, keep or family")
        if self.undecided:
            remarks.append("keep: auto: sizes are those of a model with nothing kept; calibration decides")
        if self.mode == "static":
            most = self._column_budget(source)
            remarks.append(f"up to {most} numbers of outlier columns go to {OUTLIERS}/, in the weights' dtypes")
        if self.mode == "static" or (self.mode == "dynamic" and self.format == "compressed-tensors"):
            remarks.append(f"outliers: {self.mode}: reattend.load computes it, other engines plain W8A8")
        return remarks

    def _column_budget(self, source: Source) -> int:
        """Numbers that static columns may add."""
        numbers = sum(source.tensors[f"{module}.weight"].numel for module in self._modules(source))
        return int(self.outlier_share * numbers)

    def _modules(self, source: Source) -> list[str]:
        return [
            module
            for module, _ in source.linears()
            if any(fnmatch.fnmatchcase(module, p) for p in self.select)
            and not any(fnmatch.fnmatchcase(module, p) for p in self._kept)
        ]

    @property
    def _kept(self) -> tuple[str, ...]:
        """The selectors of `keep`; none before calibration has decided."""
        return () if self.keep == "auto" else self.keep

    @property
    def undecided(self) -> bool:
        """Whether `keep: auto` is still to be decided."""
        return self.keep == "auto"

    def settled(self, findings: Mapping[str, Any]) -> "Int8":
        """Return the step with the linears that were kept by name."""
        if not self.undecided:
            return self
        return self.model_copy(update={"keep": tuple(findings["kept"])})

    @property
    def _layout(self) -> Format:
        if self.format == "bitsandbytes":
            return "bitsandbytes"
        return "int-quantized" if self.activations == "int8" else "pack-quantized"

    def statistics_bytes(self, source: Source) -> int:
        """Compensated codes and scales, the columns that static ones are chosen from and those chosen, factors."""
        total = 8 * self._column_budget(source) if self.mode == "static" else 0
        for weight in (source.tensors[f"{module}.weight"] for module in self._modules(source)):
            rows, columns = weight.shape
            total += rows * (columns + 4) if self.rounding == "compensated" else 0
            total += rows * min(MOST_COLUMNS, columns) * weight.nbytes // weight.numel if self.mode == "static" else 0
            total += 4 * columns if self.mode == "smooth" else 0
        return total

    def groups(self, source: Source) -> Iterator[Group]:
        """Yield one group per linear layer, or, where calibration ties them together, per decoder layer."""
        taken = {f"{module}.weight" for module in self._modules(source)}
        tied: set[str] = set()
        for layer in range(source.num_layers if self._learns else 0):
            if names := self._layer_reads(source, layer):
                tied |= set(names)
                yield Group(tuple(names), self._writes(source, names, taken), key=str(layer))
        for module in self._modules(source):
            if (name := f"{module}.weight") not in tied:
                yield Group((name,), self._writes(source, [name], taken))

    def _layer_reads(self, source: Source, layer: int) -> list[str]:
        """The tensors of a layer that calibration has a say in."""
        prefix = source.layer_prefix(layer)
        smoothed = layer_tensors(source, prefix) if self.mode == "smooth" else []
        rounded = [f"{m}.weight" for m in self._modules(source) if m.startswith(prefix)]
        return list(dict.fromkeys([*smoothed, *(rounded if self.rounding == "compensated" else [])]))

    def _writes(self, source: Source, names: list[str], taken: set[str]) -> tuple[TensorSpec, ...]:
        every = (source.tensors[name] for name in names)
        return tuple(out for spec in every for out in (specs(self._layout, spec) if spec.name in taken else (spec,)))

    @property
    def texts(self) -> tuple[str, ...]:
        """Smoothing is fitted to one text and chosen on another, where `keep: auto` measures too."""
        selection = ("selection",) if self.mode == "smooth" or self.undecided else ()
        return (("calibration",) if self._learns else ()) + selection

    @property
    def _learns(self) -> bool:
        return self.mode in ("smooth", "static") or self.rounding == "compensated"

    def calibrate(self, source: Source, passes: Passes, statistics: Statistics) -> None:
        """Find every layer's smoothing factors, compensated codes and outlier columns; then decide what to keep."""
        if self._learns:
            self._learn(source, passes, statistics)
        if self.undecided:
            options: dict[str, Any] = {"activations": self.activations}
            if self.mode == "dynamic":
                options["threshold"] = self.threshold
            linears = Simulation(source, statistics, tuple(self._modules(source)), options)
            Keeping(linears, source.layer_prefix, self.keep_budget).decide(passes, statistics)
            if self.mode == "static":  # what is kept needs none: the others share its part
                left = [module for module in self._modules(source) if module not in statistics["kept"]]
                statistics["columns"] = choose_columns(source, statistics, left, self.outlier_share)

    def _learn(self, source: Source, passes: Passes, statistics: Statistics) -> None:
        wanted = Learned(
            frozenset(self._modules(source)), smooth=self.mode == "smooth", static=self.mode == "static",
            compensate=self.rounding == "compensated",
        )  # fmt: skip
        if any_missing(statistics, map(str, range(source.num_layers))):
            for layer in passes(*(() if wanted.smooth else ("calibration",))):
                if missing(statistics, str(layer.index)):
                    statistics[str(layer.index)] = learn_layer(layer, source, wanted)
        if wanted.static:
            statistics["columns"] = choose_columns(source, statistics, self._modules(source), self.outlier_share)

    def side_files(self, source: Source, statistics: Statistics) -> Iterator[tuple[str, bytes]]:
        """Yield the float slices of static outlier columns, a file per layer."""
        for layer in range(source.num_layers if self.mode == "static" else 0):
            yield layer_file(source.layer_prefix(layer), layer, statistics, self._modules(source))

    def apply(
        self,
        group: Group,
        tensors: Mapping[str, Tensor],
        statistics: Statistics,
        source: Source,
    ) -> dict[str, Tensor]:
        """Smooth the group if it is a layer; quantise the weights that are to be."""
        kept = {spec.name for spec in group.writes if spec == source.tensors.get(spec.name)}
        learned = statistics[group.key] if group.key else {}
        prefix = source.layer_prefix(group.key) if group.key else ""
        written: dict[str, Tensor] = {}
        for name in group.reads:  # one at a time: the fp32 copy of a single tensor is alive
            tensor, short = tensors[name], name.removeprefix(prefix)
            if name in kept:
                written[name] = migrate(short, tensor, learned, source).to(tensor.dtype)
            else:
                codes, scale = codes_of(short.removesuffix(".weight"), tensor, learned, source, tensor.dtype)
                written |= layout_tensors(self._layout, source.tensors[name], codes, scale)
        return written

    def edit_config(self, source: Source, statistics: Statistics) -> dict[str, Any]:
        """Add the format's `quantization_config`, and what `reattend.load` does about outliers beyond it."""
        taken = {f"{module}.weight" for module in self._modules(source)}
        threshold = self.threshold if self.mode == "dynamic" else 0.0
        config = {
            **source.config,
            "quantization_config": document(self._layout, unquantised(source, taken), threshold),
        }
        if self.mode == "static":
            config["int8_outliers"] = {"mode": "static"}
        elif self.mode == "dynamic" and self.format == "compressed-tensors":
            config["int8_outliers"] = {"mode": "dynamic", "threshold": self.threshold}
        return config

    def findings(self, statistics: Statistics) -> dict[str, Any]:
        """See `quantize.int8.findings`."""
        return findings(statistics)

    def engines(self, source: Source) -> dict[str, str]:
        """vLLM and SGLang fuse q/k/v and gate/up, so those must be quantised together."""
        return engines(self._layout, split=self.select != ("*",) or bool(self.keep))
