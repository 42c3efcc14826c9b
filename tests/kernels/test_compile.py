"""Every shipped Triton configuration compiles ahead of time, without a GPU: no stack, shared memory in bounds."""

import re
import subprocess

import pytest

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from reattend.kernels.int8_linear import kernel
from reattend.kernels.mla_decode import kernel as mla

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
    for rank, configs in mla.CONFIGS.items():
        for config in configs:
            yield f"mla-{rank}-{config.block_m}", mla_part(config, "bf16", rank, 64)
            yield f"mla-{rank}-{config.block_m}-wide", mla_part(config, "fp16", rank, 128)
    yield "mla-merge", mla_merge("bf16")


def _aligned(name, kind):
    """Pointers and widths are multiples of 16 in practice, which is what lets loads be wide."""
    return kind.startswith("*") or name in ("I", "O", "L", "R", "stride_cb", "stride_ct", "stride_kb", "stride_kt")


def compiled(variant, arch):
    function, pointers, constants, config = variant
    names = function.arg_names
    signature = {n: pointers.get(n, "constexpr" if n in constants else "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if _aligned(n, signature[n])}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


@pytest.mark.parametrize("arch", SHARED)
def test_no_stack_and_shared_memory_in_bounds(arch, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    dump = triton.knobs.nvidia.cuobjdump.path
    for name, variant in shipped():
        built = compiled(variant, arch)
        assert built.metadata.shared <= SHARED[arch], f"{name}: {built.metadata.shared} bytes shared"
        (tmp_path / "cubin").write_bytes(built.asm["cubin"])
        usage = subprocess.run([dump, "-res-usage", tmp_path / "cubin"], capture_output=True, text=True, check=True)
        stack = re.findall(r"STACK:(\d+)", usage.stdout + usage.stderr)
        assert stack, usage.stdout
        assert set(stack) == {"0"}, f"{name}: {usage.stdout}"
