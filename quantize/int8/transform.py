"""The step `int8`: which tensors become codes and scales, and how each format names and declares them."""

import fnmatch
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from reattend.checkpoint.header import TensorSpec
from reattend.errors import Refusal
from reattend.families.source import Source
from reattend.quantize.int8.calibration import Learned, learn_layer
from reattend.quantize.int8.formats import Format, document, specs
from reattend.quantize.int8.formats import tensors as layout_tensors
from reattend.quantize.int8.formulas import quantize_channels
from reattend.quantize.int8.migration import layer_tensors, migrate
from reattend.transform import Group, Passes, Statistics

_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
# A 2-D weight with one of these last names is looked up, never multiplied: no linear layer.
_LOOKUPS = (
    "embed_tokens",
    "embed_positions",
    "word_embeddings",
    "position_embeddings",
    "token_type_embeddings",
)


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
    outliers: Literal["none", "smooth"] = Field(
        "none",
        description="smooth: move activation outliers into the weights (needs calibration and selection texts)",
    )
    rounding: Literal["nearest", "compensated"] = Field(
        "nearest", description="compensated: weights make up for each other's rounding (needs a calibration text)"
    )
    select: tuple[str, ...] = Field(("*",), description="linear layers to quantise")
    keep: tuple[str, ...] = Field((), description="linear layers to leave in 16 bit")

    @property
    def tolerance(self) -> float:
        """Relative L2 of logits: int8 activations cost most, as a few of them are huge."""
        return 0.2 if self.activations == "int8" else 0.05

    def check(self, source: Source) -> list[str]:
        """Refuse quantised sources, Conv1D layers, non-float weights, and selectors without a match."""
        if self.format == "bitsandbytes" and self.activations == "none":
            raise Refusal("int8: activations: bitsandbytes always quantises them; use format: compressed-tensors")
        if source.config.get("quantization_config"):
            raise Refusal("config.json: quantization_config: the source is quantised already")
        if "conv1d" in source.family.features:
            raise Refusal(f"int8: {source.family.model_type} stores Conv1D layers, which neither format covers")
        if "experts" in source.family.features:
            raise Refusal(
                f"int8: {source.family.model_type} stacks its experts, and stock transformers can't load the mix"
            )
        modules = dict(source.linears())
        for pattern in (*self.select, *self.keep):
            if not fnmatch.filter(modules, pattern):
                raise Refusal(f"int8: selector {pattern!r} matches no linear layer, as {next(iter(modules))}")
        for module in self._modules(source):
            spec = source.tensors[f"{module}.weight"]
            if spec.dtype not in _FLOATS:
                raise Refusal(f"int8: tensor {spec.name!r} is {spec.dtype}, not a float")
        if not self._modules(source):
            raise Refusal("int8: select and keep together leave no layer to quantise")
        self._check_smoothing(source)
        self._check_calibrated(source)
        return self._remarks(source)

    def _check_smoothing(self, source: Source) -> None:
        if self.outliers == "none":
            return
        if self.activations == "none":
            raise Refusal("int8: outliers: there is nothing to smooth when activations are left in 16 bit")
        family = source.family
        if not family.feeds:
            raise Refusal(f"int8: outliers: {family.model_type} has no place that smoothing could use")
        post_norm = not source.get("do_layer_norm_before") or source.get("activation_function") != "relu"
        if family.model_type == "opt" and post_norm:
            raise Refusal("int8: outliers: OPT can be smoothed with do_layer_norm_before and a ReLU only")
        for prefix in (source.layer_prefix(layer) for layer in range(source.num_layers)):
            for feed in family.feeds:
                if f"{prefix}{feed.producer}.weight" not in source.tensors:
                    raise Refusal(f"int8: outliers: {prefix}{feed.producer} has no weight that could be scaled")

    def _check_calibrated(self, source: Source) -> None:
        for layer in range(source.num_layers if self.texts else 0):
            for name in self._layer_reads(source, layer):
                dtype = source.tensors[name].dtype
                if dtype not in ("F32", "F16", "BF16"):
                    raise Refusal(f"int8: tensor {name!r} is {dtype}: calibrated from F32, F16 and BF16 only")

    def _remarks(self, source: Source) -> list[str]:
        remarks = [f"{source.family.head} is kept in 16 bit" + (" (tied)" if source.tied else "")]
        kept = len(dict(source.linears())) - len(self._modules(source))
        return remarks + ([f"{kept} linear layers are kept by select, keep or family"] if kept else [])

    def _modules(self, source: Source) -> list[str]:
        return [
            module
            for module, _ in source.linears()
            if any(fnmatch.fnmatchcase(module, p) for p in self.select)
            and not any(fnmatch.fnmatchcase(module, p) for p in self.keep)
        ]

    @property
    def _layout(self) -> Format:
        if self.format == "bitsandbytes":
            return "bitsandbytes"
        return "int-quantized" if self.activations == "int8" else "pack-quantized"

    def groups(self, source: Source) -> Iterator[Group]:
        """Yield one group per linear layer, or, where calibration ties them together, per decoder layer."""
        taken = {f"{module}.weight" for module in self._modules(source)}
        tied: set[str] = set()
        for layer in range(source.num_layers if self.texts else 0):
            if names := self._layer_reads(source, layer):
                tied |= set(names)
                yield Group(tuple(names), self._writes(source, names, taken), key=str(layer))
        for module in self._modules(source):
            if (name := f"{module}.weight") not in tied:
                yield Group((name,), self._writes(source, [name], taken))

    def _layer_reads(self, source: Source, layer: int) -> list[str]:
        """The tensors of a layer that calibration has a say in."""
        prefix = source.layer_prefix(layer)
        smoothed = layer_tensors(source, prefix) if self.outliers == "smooth" else []
        rounded = [f"{m}.weight" for m in self._modules(source) if m.startswith(prefix)]
        return list(dict.fromkeys([*smoothed, *(rounded if self.rounding == "compensated" else [])]))

    def _writes(self, source: Source, names: list[str], taken: set[str]) -> tuple[TensorSpec, ...]:
        every = (source.tensors[name] for name in names)
        return tuple(out for spec in every for out in (specs(self._layout, spec) if spec.name in taken else (spec,)))

    @property
    def texts(self) -> tuple[str, ...]:
        """Smoothing is fitted to one text and chosen on another; compensation needs the first; codes alone none."""
        if self.outliers == "smooth":
            return ("calibration", "selection")
        return ("calibration",) if self.rounding == "compensated" else ()

    def calibrate(self, source: Source, passes: Passes, statistics: Statistics) -> None:
        """Find every layer's smoothing factors and compensated codes."""
        modules = frozenset(self._modules(source))
        wanted = Learned(modules, self.outliers == "smooth", self.rounding == "compensated")
        for layer in passes():
            if str(layer.index) not in statistics:
                statistics[str(layer.index)] = learn_layer(layer, source, wanted)

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
                codes, scale = self._codes(short, tensor, learned, source)
                written |= layout_tensors(self._layout, source.tensors[name], codes, scale)
        return written

    def _codes(self, name: str, tensor: Tensor, learned: dict[str, Tensor], source: Source) -> tuple[Tensor, Tensor]:
        module = name.removesuffix(".weight")
        if f"{module}.codes" in learned:
            return learned[f"{module}.codes"], learned[f"{module}.scale"]
        moved = migrate(name, tensor, learned, source) if learned else tensor
        return quantize_channels(moved, tensor.dtype)

    def edit_config(self, source: Source, statistics: Statistics) -> dict[str, Any]:
        """Add the format's `quantization_config`."""
        return {**source.config, "quantization_config": document(self._layout, self._ignored(source))}

    def _ignored(self, source: Source) -> list[str]:
        """Every linear layer that stays in 16 bit: loaders quantise what they are not told to leave."""
        taken = set(self._modules(source))
        two_d = [n.removesuffix(".weight") for n, t in source.tensors.items() if len(t.shape) == 2]
        kept = [m for m in two_d if m not in taken and not m.endswith(_LOOKUPS)]
        head = [source.family.head] if source.family.head else []
        return sorted({*kept, *head})

    def findings(self, statistics: Statistics) -> dict[str, Any]:
        """Return the W8A8 error of smoothed inputs, before and after, by layer and producer."""
        errors = {
            layer: {
                name.removesuffix(".error"): [float(f"{float(value):.3g}") for value in values]
                for name, values in learned.items()
                if name.endswith(".error")
            }
            for layer, learned in sorted(statistics.items(), key=lambda item: int(item[0]))
        }
        return {"w8a8_error_before_and_after": errors} if any(errors.values()) else {}

    def engines(self, source: Source) -> dict[str, str]:
        """vLLM and SGLang fuse q/k/v and gate/up, so those must be quantised together."""
        if self.format == "bitsandbytes":
            no = "not confirmed for int8 in this format"
            return {"transformers": "yes (bitsandbytes)", "vllm": no, "sglang": no}
        split = self.select != ("*",) or bool(self.keep)
        engine = "only if q/k/v and gate/up of a layer are quantised alike" if split else "yes"
        simulated = ", activations simulated" if self.activations == "int8" else ""
        return {
            "transformers": f"yes (weights decompressed{simulated}: no speed)",
            "vllm": engine,
            "sglang": engine,
        }
