"""The step `int8_layout`: an int8 checkpoint in another format, its codes and scales as they are."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from reattend.checkpoint.header import TensorSpec
from reattend.errors import Refusal
from reattend.families.source import Source
from reattend.quantize.int8 import formats
from reattend.quantize.int8.declared import declared_outliers, layout_of, scheme
from reattend.quantize.int8.formats import Format, int8_modules
from reattend.transform import Group, Passes, Statistics

# What belongs to an int8 linear, in any format.
_PARTS = ("weight", "weight_packed", "weight_shape", "weight_scale", "SCB", "weight_format")


class Int8Layout(BaseModel):
    """Another format for int8 codes. Nothing is quantised again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: Literal["int8_layout"] = "int8_layout"
    format: Literal["compressed-tensors", "bitsandbytes"] = Field(
        "compressed-tensors", description="layout of the output"
    )
    activations: Literal["source", "int8", "none"] = Field(
        "source", description="int8: quantised per token at run time; none: left in 16 bit (W8A16)"
    )

    @property
    def tolerance(self) -> float:
        """Relative L2 of logits: codes are the same, but engines treat outliers as their format says."""
        return 0.2

    @property
    def texts(self) -> tuple[str, ...]:
        """None: nothing is measured."""
        return ()

    def check(self, source: Source) -> list[str]:
        """Refuse what is not int8 per channel, and activations that the format can't leave alone."""
        if not source.config.get("quantization_config"):
            raise Refusal("int8_layout: the source is not quantised; use the step int8")
        layout_of(source.config)
        if not int8_modules(source.tensors.values()):
            raise Refusal("int8_layout: the source has no int8 weight, though config.json declares them")
        if self.format == "bitsandbytes" and self._activations(source) == "none":
            raise Refusal("int8_layout: bitsandbytes always quantises activations: set activations: int8")
        if self._activations(source) == "none" and declared_outliers(source.config)[0] == "static":
            raise Refusal("int8_layout: activations: static outlier columns belong to int8 activations")
        for module in int8_modules(source.tensors.values()):
            self._check_parts(module, source)
        return []

    def _check_parts(self, module: str, source: Source) -> None:
        here = source.tensors
        packed = f"{module}.weight_packed" in here
        if packed and module not in source.linear_shapes:
            raise Refusal(f"tensor '{module}.weight_packed': no linear layer of {source.family.model_type}")
        wanted = [f"{module}.weight_shape"] if packed else []
        wanted.append(f"{module}.SCB" if layout_of(source.config) == "bitsandbytes" else f"{module}.weight_scale")
        for name in wanted:
            if name not in here:
                raise Refusal(f"tensor {name!r} is missing")
        if f"{module}.weight_zero_point" in here:
            raise Refusal(
                f"tensor '{module}.weight_zero_point': codes with a zero point have no place in the formats"
            )

    def _activations(self, source: Source) -> str:
        return str(scheme(source.config)["activations"]) if self.activations == "source" else self.activations

    def _layout(self, source: Source) -> Format:
        if self.format == "bitsandbytes":
            return "bitsandbytes"
        return "int-quantized" if self._activations(source) == "int8" else "pack-quantized"

    def calibrate(self, source: Source, passes: Passes, statistics: Statistics) -> None:
        """Nothing is measured."""

    def statistics_bytes(self, source: Source) -> int:
        """None."""
        return 0

    @property
    def undecided(self) -> bool:
        """Nothing is: the step does not calibrate."""
        return False

    def settled(self, findings: Mapping[str, Any]) -> "Int8Layout":
        """Return the step."""
        return self

    def groups(self, source: Source) -> Iterator[Group]:
        """Yield one group per int8 linear."""
        for module in int8_modules(source.tensors.values()):
            every = (f"{module}.{part}" for part in _PARTS)
            reads = tuple(name for name in every if name in source.tensors)
            yield Group(reads, formats.specs(self._layout(source), self._weight(module, source)), key=module)

    def _weight(self, module: str, source: Source) -> TensorSpec:
        """The weight as it was: its shape, and for a dtype that of the scale."""
        scale = source.tensors.get(f"{module}.weight_scale")
        known = source.linear_shapes
        shape = known[module] if module in known else source.tensors[f"{module}.weight"].shape
        return TensorSpec(f"{module}.weight", scale.dtype if scale else "F32", shape)

    def apply(
        self, group: Group, tensors: Mapping[str, Tensor], statistics: Statistics, source: Source
    ) -> dict[str, Tensor]:
        """Return the same codes and scales, named and held as the format does."""
        codes, scale = formats.read_codes(layout_of(source.config), group.key, tensors.keys(), tensors.__getitem__)
        return formats.tensors(self._layout(source), self._weight(group.key, source), codes, scale.float())

    def edit_config(self, source: Source, statistics: Statistics) -> dict[str, Any]:
        """Declare the format; a dynamic threshold goes to where the format, or else `reattend.load`, looks for it."""
        threshold = scheme(source.config)["threshold"] or 0.0
        quantised = {f"{module}.weight" for module in int8_modules(source.tensors.values())}
        config = {key: value for key, value in source.config.items() if key != "int8_outliers"}
        config["quantization_config"] = formats.document(
            self._layout(source), formats.unquantised(source, quantised), threshold
        )
        if declared_outliers(source.config)[0] == "static":
            config["int8_outliers"] = {"mode": "static"}
        elif threshold and self.format != "bitsandbytes" and self._activations(source) == "int8":
            config["int8_outliers"] = {"mode": "dynamic", "threshold": threshold}
        return config

    def side_files(self, source: Source, statistics: Statistics) -> Iterator[tuple[str, bytes]]:
        """Yield nothing: the source's own are copied."""
        yield from ()

    def findings(self, statistics: Statistics) -> dict[str, Any]:
        """Return nothing: nothing is measured."""
        return {}

    def engines(self, source: Source) -> dict[str, str]:
        """As the step `int8` says of its formats."""
        split = len(int8_modules(source.tensors.values())) < len(source.linear_shapes)
        return formats.engines(self._layout(source), split=split)
