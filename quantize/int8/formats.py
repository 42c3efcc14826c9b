"""How each format names, holds and declares int8 weights: written and read.

Formats: compressed-tensors `int-quantized` (`weight` I8, `weight_scale`) and `pack-quantized` with one scale per
channel (`weight_packed`, `weight_shape`, `weight_scale`); bitsandbytes (`weight` I8, `SCB` = 127 scales).
"""

from collections.abc import Callable, Container, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from reattend.checkpoint.header import TensorSpec
from reattend.checkpoint.tensors import TORCH_DTYPES
from reattend.errors import Refusal
from reattend.families.source import Source
from reattend.quantize.int8.formulas import CODE_MAX, pack_codes, unpack_codes

# The layouts of compressed-tensors by their names there, and that of bitsandbytes.
Format = Literal["int-quantized", "pack-quantized", "bitsandbytes"]
# A 2-D weight with one of these last names is looked up, never multiplied: no linear layer.
_LOOKUPS = (
    "embed_tokens",
    "embed_positions",
    "word_embeddings",
    "position_embeddings",
    "token_type_embeddings",
)
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


def unquantised(source: Source, taken: Container[str]) -> list[str]:
    """Return every linear layer whose weight is not `taken`: loaders quantise what they are not told to leave."""
    two_d = [n for n, t in source.tensors.items() if len(t.shape) == 2 and n.endswith(".weight") and n not in taken]
    kept = {n.removesuffix(".weight") for n in two_d}
    return sorted(
        {m for m in kept if not m.endswith(_LOOKUPS)} | ({source.family.head} if source.family.head else set())
    )


def engines(format: Format, *, split: bool) -> dict[str, str]:
    """Say which engines read a format; `split`: of linears that engines fuse, some may be quantised, others not."""
    if format == "bitsandbytes":
        no = "not confirmed for int8 in this format"
        return {"transformers": "yes (bitsandbytes)", "vllm": no, "sglang": no}
    engine = "only if q/k/v and gate/up of a layer are quantised alike" if split else "yes"
    simulated = ", activations simulated" if format == "int-quantized" else ""
    stock = f"yes (weights decompressed{simulated}: no speed)"
    return {"transformers": stock, "vllm": engine, "sglang": engine}


def int8_modules(stored: Iterable[TensorSpec]) -> list[str]:
    """Return the linears among a checkpoint's tensors that are held as codes."""
    found = ((*spec.name.rpartition("."), spec.dtype) for spec in stored)
    return [m for m, _, leaf, dtype in found if leaf == "weight_packed" or (leaf == "weight" and dtype == "I8")]


def read_codes(
    format: Format, module: str, stored: Container[str], read: Callable[[str], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return int8 codes (O, I) and scales (O, 1) of a `module` as a format stores them.

    `read` returns a tensor by name; `stored` are the names. Raises `Refusal` for scales that are not one per output.
    """
    if f"{module}.weight_packed" in stored:
        codes = unpack_codes(read(f"{module}.weight_packed"), read(f"{module}.weight_shape"))
    else:
        codes = read(f"{module}.weight")
    name = f"{module}.SCB" if format == "bitsandbytes" else f"{module}.weight_scale"
    scale = read(name) / CODE_MAX if format == "bitsandbytes" else read(name)
    if scale.numel() != len(codes):
        raise Refusal(f"tensor {name!r} has not one number per output")
    return codes, scale.reshape(-1, 1)
