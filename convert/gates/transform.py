"""The step `gates`: heads get a gate on their output, open so far that nothing changes before training."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from reattend.checkpoint.header import TensorSpec
from reattend.checkpoint.tensors import TORCH_DTYPES
from reattend.convert.gates.formulas import GateShape, Kind, start_tensors, stored_openness
from reattend.convert.portable.step import PortableStep
from reattend.errors import Refusal
from reattend.families.source import Source
from reattend.transform import Group, Statistics

_FLOATS = ("F64", "F32", "F16", "BF16")


class Gates(PortableStep):
    """Gated attention (Quantizable Transformers; Qwen's gate after attention), to be trained by `heal`."""

    step: Literal["gates"] = "gates"
    kind: Kind = Field(
        "linear", description="linear or mlp on each head's slice of the input; all_heads_linear; elementwise"
    )
    openness: float = Field(
        0.5, gt=0, lt=1, strict=True, description="pi0, how open gates start; 1 / pi0 is folded into o_proj"
    )
    hidden: int = Field(4, ge=1, strict=True, description="hidden units per head of kind mlp")
    seed: int = Field(0, ge=0, le=2**31, strict=True, description="seed of kind mlp's first map")

    @property
    def tolerance(self) -> float:
        """At 1/2 the fold is exact; else `o_proj` and the gate are rounded once more."""
        return 1e-5 if self.openness == 0.5 else 0.02

    def check(self, source: Source) -> list[str]:
        """Refuse a source that has gates, and sizes and dtypes that can't take them."""
        remarks = super().check(source)
        if source.config.get("attention_gates") is not None:
            raise Refusal("config.json: attention_gates: the source has gates already")
        if "attention_drop" in source.family.features:
            raise Refusal("gates: layers of the source have no attention to put a gate on")
        hidden, heads = source.size("hidden"), int(source.get("heads"))
        if self.kind in ("linear", "mlp") and hidden % heads:
            raise Refusal(f"gates: kind: {self.kind} cuts the input into {heads} slices, which don't divide {hidden}")
        for layer in range(source.num_layers):
            self._check_output(source, layer)
        count = sum(_numel(shape) for shape in self._shape(source).tensors().values()) * source.num_layers
        return [*remarks, f"gates add {count} parameters; before training they change nothing"]

    def _check_output(self, source: Source, layer: int) -> None:
        name = _output(source, layer)
        if name not in source.tensors:
            raise Refusal(f"gates: tensor {name!r} is missing; quantised layers can't take gates")
        if source.tensors[name].dtype not in _FLOATS:
            raise Refusal(f"gates: tensor {name!r} is {source.tensors[name].dtype}, not a 16-, 32- or 64-bit float")

    def _shape(self, source: Source) -> GateShape:
        return GateShape(self.kind, source.size("hidden"), int(source.get("heads")), source.head_dim, self.hidden)

    def parts(self, source: Source, statistics: Statistics) -> dict[str, Any]:
        """Return the config's key."""
        units = {"hidden": self.hidden} if self.kind == "mlp" else {}
        return {"attention_gates": {"kind": self.kind, **units}}

    def groups(self, source: Source) -> Iterator[Group]:
        """Yield each layer's output projection, which the gate's tensors go with."""
        for layer in range(source.num_layers):
            output = source.tensors[_output(source, layer)]
            prefix = f"{source.layer_prefix(layer)}{source.family.attention}.gate."
            shapes = self._shape(source).tensors().items()
            gate = (TensorSpec(prefix + name, output.dtype, size) for name, size in shapes)
            yield Group((output.name,), (output, *gate), key=str(layer))

    def apply(
        self, group: Group, tensors: Mapping[str, Tensor], statistics: Statistics, source: Source
    ) -> dict[str, Tensor]:
        """Return the projection divided by the gate's openness, and the gate."""
        output, *specs = group.writes
        dtype = TORCH_DTYPES[output.dtype]
        folded = (tensors[output.name].double() / stored_openness(self.openness, dtype)).to(dtype)
        if bool((folded.isinf() & tensors[output.name].isfinite()).any()):
            raise Refusal(
                f"gates: openness: tensor {output.name!r} / {self.openness} does not fit into {output.dtype}"
            )
        made = start_tensors(self._shape(source), self.openness, self.seed + int(group.key))
        gate = {spec.name: made[spec.name.rpartition(".gate.")[2]].to(dtype) for spec in specs}
        return {output.name: folded, **gate}


def _output(source: Source, layer: int) -> str:
    return f"{source.layer_prefix(layer)}{source.family.attention_output}.weight"


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
