"""Every shipped Triton configuration compiles ahead of time, without a GPU: no stack, shared memory in bounds."""

import itertools
import re
import subprocess

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from reattend.kernels.attention import kernel as attend
from reattend.kernels.attention import kernel_backward, kernel_decode, kernel_tiles
from reattend.kernels.dictionary_linear import kernel as dictionary
from reattend.kernels.int8_linear import kernel
from reattend.kernels.mla_decode import kernel as mla
from reattend.kernels.shared_decode import kernel as shared_kernel

# Dynamic shared memory that one block may use, bytes (CUDA programming guide, compute capabilities).
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
FLOATS = ("fp16", "bf16", "fp32")


def quantize(dtype, mask):
    pointers = {"p_x": f"*{dtype}", "p_mask": "*i8", "p_codes": "*i8", "p_scale": "*fp32"}
    constants = {"HAS_MASK": mask, "BLOCK_I": kernel.QUANTIZE.block_i}
    return kernel._quantize_rows_kernel, pointers, constants, kernel.QUANTIZE


def w8a8(config, dtype, outliers):
    pointers = {
        "p_a": "*i8", "p_a_scale": "*fp32", "p_w": "*i8", "p_w_scale": "*fp32", "p_bias": "*fp32",
        "p_x": f"*{dtype}", "p_columns": "*i64", "p_slice": "*fp32", "p_y": f"*{dtype}",
    }  # fmt: skip
    constants = {"HAS_BIAS": True, "HAS_OUTLIERS": outliers, **blocks(config), "BLOCK_N": kernel.OUTLIER_BLOCK}
    return kernel._w8a8_kernel, pointers, constants, config


def w8a16(config, dtype, op):
    pointers = {
        "p_x": f"*{dtype}", "p_w": "*i8", "p_w_scale": "*fp32", "p_bias": "*fp32", "p_y": f"*{dtype}"
    }  # fmt: skip
    sizes = blocks(config)
    if op is kernel._w8a16_gemv_kernel:
        del sizes["BLOCK_M"]
    return op, pointers, {"HAS_BIAS": True, **sizes}, config


def dictionary_linear(config, dtype):
    pointers = dict.fromkeys(("p_x", "p_atoms", "p_c", "p_h", "p_up", "p_bias", "p_y"), f"*{dtype}")
    return dictionary._dictionary_kernel, pointers, {"HAS_BIAS": True, **blocks(config)}, config


def blocks(config):
    return {"BLOCK_M": config.block_m, "BLOCK_O": config.block_o, "BLOCK_I": config.block_i}


def mla_part(config, dtype, rank, rope):
    pointers = dict.fromkeys(("p_q", "p_qr", "p_c", "p_k"), f"*{dtype}")
    pointers |= {"p_mask": "*i8", "p_part": "*fp32", "p_lse": "*fp32", "scale": "fp32"}
    sizes = {"BLOCK_M": config.block_m, "BLOCK_T": config.block_t, "BLOCK_L": rank, "BLOCK_R": rope}
    return mla._part_kernel, pointers, {"HAS_MASK": True, **sizes}, config


def mla_merge(dtype):
    pointers = {"p_part": "*fp32", "p_lse": "*fp32", "p_out": f"*{dtype}"}
    return mla._merge_kernel, pointers, {"BLOCK_L": 512}, mla.Config(1, 1, 4, 2)


def shared(function, dtype, width):
    pointers = dict.fromkeys(("p_q", "p_k", "p_v"), f"*{dtype}") | {"p_mask": "*i8", "scale": "fp32"}
    pointers |= dict.fromkeys(("p_score", "p_part", "p_lse"), "*fp32")
    constants = {"HAS_MASK": True, **shared_kernel.blocks(8, width, width, 4 if dtype == "fp32" else 2)}
    config = mla.Config(16, constants["BLOCK_T"], shared_kernel.warps(width), shared_kernel.STAGES)
    return (
        function, {name: kind for name, kind in pointers.items() if name in function.arg_names},
        {name: value for name, value in constants.items() if name in function.arg_names}, config,
    )  # fmt: skip


# What attention kernels take that may be absent, and what takes the most registers.
ATTENTION_KINDS = {"p_ranges": "*i32", "cap": "fp32", "window": "i32"}
ATTENTION_KINDS |= dict.fromkeys(("p_slopes", "p_sinks", "p_gamma", "p_dlse"), "*fp32")
ROOMY = ("p_ranges", "window", "p_sinks")
BIASED = (*ROOMY, "cap", "p_slopes", "p_dlse")
CLIPPED = ("p_ranges", "window", "cap", "p_slopes", "p_gamma", "p_dlse")


def attention(function, config, dtype, widths, options=(), absent=()):
    absent = {name for name in ATTENTION_KINDS if name not in options} | set(absent)
    pointers = dict.fromkeys(("p_q", "p_k", "p_v", "p_out", "p_dout", "p_dq", "p_dk", "p_dv"), f"*{dtype}")
    pointers |= dict.fromkeys(("p_lse", "p_delta", "p_part", "p_part_lse"), "*fp32") | ATTENTION_KINDS
    pointers |= dict.fromkeys(("scale", "factor", "zeta"), "fp32")
    width, wide = widths
    parts, share = attend.value_parts(wide) if function is attend._forward_kernel else (1, wide)
    tiles = (*kernel_tiles.chunks(width), *kernel_tiles.chunks(share))
    constants = dict(zip(("D1", "D2", "V1", "V2"), tiles, strict=True)) | dict.fromkeys(absent)
    constants |= {"CAUSAL": True, "D": width, "V": wide, "PARTS": parts}
    constants |= {"BLOCK_M": config.block_m, "BLOCK_T": config.block_t}
    return (
        function, {name: kind for name, kind in pointers.items() if name not in absent},
        {name: value for name, value in constants.items() if name in function.arg_names}, config,
    )  # fmt: skip


def attention_forward():
    function = attend._forward_kernel
    for config, dtype, widths, options in (
        (attend._ROOMY, "bf16", (64, 64), ROOMY),
        (attend._ROOMY, "fp16", (128, 128), ()),
        (attend._ROOMY, "bf16", (128, 128), ROOMY),
        (attend._TIGHT, "bf16", (72, 72), CLIPPED),
        (attend._TIGHT, "fp16", (128, 128), BIASED),
        (attend._WIDE, "bf16", (192, 128), ()),
        (attend._WIDE, "bf16", (256, 256), CLIPPED),
        (attend._FP32, "fp32", (64, 64), ()),
        (attend._FP32, "fp32", (256, 256), CLIPPED),
    ):
        yield f"attention {config} {dtype} {widths} {options}", attention(function, config, dtype, widths, options)


def attention_decode():
    widest = {  # of widths that share a tile
        (config, dtype): width
        for width, configs in kernel_decode.CONFIGS.items()
        for config, dtype in zip(configs, ("bf16", "fp16", "fp32"), strict=True)
    }
    for (config, dtype), width in widest.items():
        yield f"decode {config}", attention(kernel_decode._part_kernel, config, dtype, (width, width), BIASED)
    pointers = {"p_part": "*fp32", "p_part_lse": "*fp32", "p_out": "*bf16", "p_lse": "*fp32", "p_sinks": "*fp32"}
    merge = kernel_decode.MERGE
    yield "merge", (kernel_decode._merge_kernel, pointers, {"BLOCK_P": merge.block_m, "BLOCK_V": 256}, merge)


def attention_backward():
    """The widest of each tile, and some that are masked at their end; plain too where that leaves ptxas a choice."""
    for width, dtype, options in (
        (32, "bfloat16", CLIPPED), (64, "bfloat16", CLIPPED), (72, "bfloat16", BIASED), (120, "bfloat16", BIASED),
        (128, "bfloat16", CLIPPED), (128, "bfloat16", ()), (256, "bfloat16", CLIPPED), (128, "float32", BIASED),
        (256, "float32", ()),
    ):  # fmt: skip
        kind = {"bfloat16": "bf16", "float32": "fp32"}[dtype]
        padded = kernel_tiles.padded(width)
        of_queries, of_keys, of_values = kernel_backward.configs_for(padded, getattr(torch, dtype), padded > width)
        name, widths = f"{width} {kind} {options}", (width, width)
        if width not in (64, 72, 120):  # which share a tile with 128
            yield f"dq {name}", attention(kernel_backward._query_kernel, of_queries, kind, widths, options)
        if width == 32:  # which shares a tile with 64
            continue
        split = kernel_backward.is_split(width, getattr(torch, dtype))
        for absent in (("p_dk",), ("p_dv",)) if split else ((),):
            config = of_values if absent == ("p_dk",) else of_keys
            variant = attention(kernel_backward._key_kernel, config, kind, widths, options, absent)
            yield f"dk, dv {name} without {absent}", variant


def attending():
    """Attention's tiles with the most and the least that they do."""
    return itertools.chain(attention_forward(), attention_decode(), attention_backward())


def shared_out(variants, arch):
    """8.6 and 8.9 have the same instructions and limits here, and ptxas gave both the same: each compiles half."""
    variants = list(variants)
    return {86: variants[::2], 89: variants[1::2]}.get(arch, variants)


def shipped():
    """Every tile and dtype; the variant without mask or outliers, a part of the other, in one dtype only."""
    for dtype in FLOATS:
        variants = (False, True) if dtype == "bf16" else (True,)
        for extra in variants:
            yield f"quantize-{dtype}-{extra}", quantize(dtype, extra)
            for config in kernel.W8A8_CONFIGS:
                yield f"w8a8-{config.block_m}-{dtype}-{extra}", w8a8(config, dtype, extra)
        for config in kernel.w8a16_configs(dtype == "fp32"):
            yield f"w8a16-{config.block_m}-{dtype}", w8a16(config, dtype, kernel._w8a16_kernel)
        yield f"gemv-{dtype}", w8a16(kernel.GEMV, dtype, kernel._w8a16_gemv_kernel)
        for config in dictionary.configs(
            getattr(torch, {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}[dtype])
        ):
            yield f"dictionary-{config.block_m}-{dtype}", dictionary_linear(config, dtype)
    for rank, configs in mla.CONFIGS.items():
        for config in configs:
            yield f"mla-{rank}-{config.block_m}", mla_part(config, "bf16", rank, 64)
            yield f"mla-{rank}-{config.block_m}-wide", mla_part(config, "fp16", rank, 128)
    yield "mla-merge", mla_merge("bf16")
    for function in (shared_kernel._lead_kernel, shared_kernel._follow_kernel):
        for dtype, width in (("bf16", 64), ("fp16", 128), ("bf16", 256), ("fp32", 256)):
            yield f"shared-{function.fn.__name__}-{dtype}-{width}", shared(function, dtype, width)


def _aligned(name, kind):
    """Pointers and widths are multiples of 16 in practice, which is what lets loads be wide."""
    if re.fullmatch("stride_[cqkvo][bghst]", name):
        return True
    return kind.startswith("*") or name in ("I", "O", "L", "R")


def compiled(variant, arch):
    function, pointers, constants, config = variant
    names = function.arg_names
    signature = {n: pointers.get(n, "constexpr" if n in constants else "i32") for n in names}
    varying = [(i, n) for i, n in enumerate(names) if signature[n] != "constexpr"]
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in varying if _aligned(n, signature[n])}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    options["maxnreg"] = getattr(config, "registers", None)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def check(variants, arch, folder):
    """Hold what ptxas made of variants against the limits."""
    for name, variant in variants:
        built = compiled(variant, arch)
        assert built.metadata.shared <= SHARED[arch], f"{name} on {arch}: {built.metadata.shared} bytes shared"
        (folder / "cubin").write_bytes(built.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", folder / "cubin"]
        usage = subprocess.run(command, capture_output=True, text=True, check=True)
        stack = re.findall(r"STACK:(\d+)", usage.stdout + usage.stderr)
        assert stack, usage.stdout
        assert set(stack) == {"0"}, f"{name} on {arch}: {usage.stdout}"


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("variants", [shipped, attending], ids=["linears and mla", "attention"])
def test_no_stack_and_shared_memory_in_bounds(arch, variants, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    check(shared_out(variants(), arch), arch, tmp_path)


@pytest.mark.parametrize(
    ("ones", "causal"), [("S P parts stride_qh stride_kt", True), ("T stride_qs stride_vt", False)]
)
def test_attention_compiles_where_sizes_are_one(ones, causal, tmp_path, monkeypatch):
    """Triton makes a constant of an argument that is 1."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    config = attend.Config(16, 16, 4, 1)
    for function in (
        attend._forward_kernel, kernel_decode._part_kernel, kernel_backward._query_kernel, kernel_backward._key_kernel
    ):  # fmt: skip
        _, pointers, constants, _ = attention(function, config, "fp16", (16, 16), ROOMY if causal else ())
        constants |= {name: 1 for name in ones.split() if name in function.arg_names} | {"CAUSAL": causal}
        assert compiled((function, pointers, constants, config), 80).metadata.shared <= SHARED[80]
