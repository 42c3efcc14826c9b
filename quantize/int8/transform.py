"""The step `int8`: which tensors become codes and scales, and how each format names and declares them."""

import fnmatch
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from reattend.checkpoint.header import TensorSpec
from reattend.errors import Refusal
from reattend.families import Source
from reattend.quantize.int8.formulas import CODE_MAX, pack_codes, quantize_channels
from reattend.transform import Group, Passes

_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_TORCH = {"F16": torch.float16, "F32": torch.float32, "BF16": torch.bfloat16}
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
        return self._remarks(source)

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

    def groups(self, source: Source) -> Iterator[Group]:
        """Yield one group per linear layer."""
        for module in self._modules(source):
            weight = source.tensors[f"{module}.weight"]
            yield Group((weight.name,), (*self._code_specs(module, weight), *self._scale_specs(module, weight)))

    def _code_specs(self, module: str, weight: TensorSpec) -> tuple[TensorSpec, ...]:
        if self.activations == "int8":
            return (TensorSpec(weight.name, "I8", weight.shape),)
        rows, columns = weight.shape
        packed = TensorSpec(f"{module}.weight_packed", "I32", (rows, -(-columns // 4)))
        return packed, TensorSpec(f"{module}.weight_shape", "I64", (2,))

    def _scale_specs(self, module: str, weight: TensorSpec) -> tuple[TensorSpec, ...]:
        rows = weight.shape[0]
        if self.format == "bitsandbytes":
            form = TensorSpec(f"{module}.weight_format", "U8", ())
            return TensorSpec(f"{module}.SCB", "F32", (rows,)), form
        dtype = weight.dtype if weight.dtype in _TORCH else "BF16"
        return (TensorSpec(f"{module}.weight_scale", dtype, (rows, 1)),)

    @property
    def texts(self) -> tuple[str, ...]:
        """No text is needed: the codes follow from the weights alone."""
        return ()

    def calibrate(self, source: Source, passes: Passes) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """No statistics are needed."""
        return iter(())

    def apply(
        self, group: Group, tensors: Mapping[str, Tensor], statistics: Mapping[str, dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Quantise the group's one weight."""
        (weight,) = (tensors[name] for name in group.reads)
        codes, scale = quantize_channels(weight, weight.dtype)
        if self.format == "bitsandbytes":
            # SCB is the row's absmax in bitsandbytes: exact in fp32, 8 + 7 significant bits.
            values: tuple[Tensor, ...] = (codes, (scale * CODE_MAX).flatten(), torch.zeros((), dtype=torch.uint8))
        elif self.activations == "int8":
            values = (codes, scale.to(_TORCH[group.writes[-1].dtype]))
        else:
            shape = torch.tensor(codes.shape)
            values = (pack_codes(codes), shape, scale.to(_TORCH[group.writes[-1].dtype]))
        return {spec.name: value for spec, value in zip(group.writes, values, strict=True)}

    def edit_config(self, source: Source) -> dict[str, Any]:
        """Add the format's `quantization_config`."""
        ignore = self._ignored(source)
        bitsandbytes = self.format == "bitsandbytes"
        document = _bitsandbytes(ignore) if bitsandbytes else _compressed_tensors(ignore, self.activations)
        return {**source.config, "quantization_config": document}

    def _ignored(self, source: Source) -> list[str]:
        """Every linear layer that stays in 16 bit: loaders quantise what they are not told to leave."""
        taken = set(self._modules(source))
        two_d = [n.removesuffix(".weight") for n, t in source.tensors.items() if len(t.shape) == 2]
        kept = [m for m in two_d if m not in taken and not m.endswith(_LOOKUPS)]
        head = [source.family.head] if source.family.head else []
        return sorted({*kept, *head})

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


def _compressed_tensors(ignore: list[str], activations: str) -> dict[str, Any]:
    shared = {"num_bits": 8, "type": "int", "symmetric": True}
    weights = {**shared, "strategy": "channel", "dynamic": False}
    inputs = {**shared, "strategy": "token", "dynamic": True} if activations == "int8" else None
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if activations == "int8" else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
        "ignore": ignore,
    }


def _bitsandbytes(skip: list[str]) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "load_in_4bit": False,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": skip,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }
