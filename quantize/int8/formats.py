"""How each format names, holds and declares int8 weights."""

from typing import Any, Literal

import torch
from torch import Tensor

from reattend.checkpoint.header import TensorSpec
from reattend.checkpoint.tensors import TORCH_DTYPES
from reattend.quantize.int8.formulas import CODE_MAX, pack_codes

# The layouts of compressed-tensors by their names there, and that of bitsandbytes.
Format = Literal["int-quantized", "pack-quantized", "bitsandbytes"]
_SCALES = ("F16", "F32", "BF16")  # what a scale is stored in: the weight's own dtype, or bf16


def specs(format: Format, weight: TensorSpec) -> tuple[TensorSpec, ...]:
    """Return the specs that stand for the linear weight `weight` (O, I)."""
    module = weight.name.removesuffix(".weight")
    rows, columns = weight.shape
    scale = TensorSpec(f"{module}.weight_scale", weight.dtype if weight.dtype in _SCALES else "BF16", (rows, 1))
    codes = TensorSpec(weight.name, "I8", weight.shape)
    if format == "int-quantized":
        return codes, scale
    if format == "pack-quantized":
        packed = TensorSpec(f"{module}.weight_packed", "I32", (rows, -(-columns // 4)))
        return packed, TensorSpec(f"{module}.weight_shape", "I64", (2,)), scale
    form = TensorSpec(f"{module}.weight_format", "U8", ())
    return codes, TensorSpec(f"{module}.SCB", "F32", (rows,)), form


def tensors(format: Format, weight: TensorSpec, codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """Return the tensors of `specs` for int8 codes (O, I) and fp32 scales (O, 1)."""
    written = specs(format, weight)
    if format == "bitsandbytes":
        # SCB is the row's absmax in bitsandbytes: exact in fp32, 8 + 7 significant bits.
        values = [codes, (scale * CODE_MAX).flatten(), torch.zeros((), dtype=torch.uint8)]
    else:
        stored = [codes] if format == "int-quantized" else [pack_codes(codes), torch.tensor(codes.shape)]
        values = [*stored, scale.to(TORCH_DTYPES[written[-1].dtype])]
    return {spec.name: value for spec, value in zip(written, values, strict=True)}


def document(format: Format, ignored: list[str], threshold: float) -> dict[str, Any]:
    """Return the `quantization_config` of a format.

    `ignored` are the linear layers left in 16 bit; `threshold` is that of dynamic outliers, 0 for none, which
    bitsandbytes alone can say.
    """
    if format == "bitsandbytes":
        return {
            "quant_method": "bitsandbytes",
            "load_in_8bit": True,
            "load_in_4bit": False,
            "llm_int8_threshold": threshold,
            "llm_int8_skip_modules": ignored,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
        }
    shared = {"num_bits": 8, "type": "int", "symmetric": True}
    weights = {**shared, "strategy": "channel", "dynamic": False}
    inputs = {**shared, "strategy": "token", "dynamic": True} if format == "int-quantized" else None
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
        "ignore": ignored,
    }
