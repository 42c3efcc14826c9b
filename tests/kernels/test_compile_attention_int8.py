"""Every tile of quantised attention compiles ahead of time, as test_compile.py has it for the other kernels."""

import re

import pytest

pytest.importorskip("triton")

import attention_int8_compile as variants
import test_compile as gate

from reattend.kernels.attention_int8 import kernel

FP8 = [arch for arch in gate.SHARED if arch >= 89]


@pytest.fixture(autouse=True)
def _compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    aligned = gate._aligned
    monkeypatch.setattr(gate, "_aligned", lambda name, kind: aligned(name, kind) or name in variants.STRIDES)


@pytest.mark.parametrize("arch", gate.SHARED)
def test_no_stack_and_shared_memory_in_bounds(arch, tmp_path):
    gate.check([item for item in variants.shipped() if variants.is_for(item[0], arch)], arch, tmp_path)


@pytest.mark.parametrize("arch", FP8)
def test_upstream_388_fp8_products_start_from_zero(arch):
    """Their accumulators keep fewer bits than fp32: each tile's product must be added outside of them."""
    built = gate.compiled(variants.forward(kernel.CONFIGS[64][1], 64, "fp8"), arch)
    products = re.findall(r"(?:tt\.dot|warp_group_dot) %\S+, %\S+, (%\w+).*f8E4M3FN.*f8E4M3FN", built.asm["ttgir"])
    assert len(products) == 2  # tiles without a mask, and with one
    for accumulator in products:
        zero = re.escape(accumulator) + r" = arith\.constant dense<0\.0+e\+00>"
        assert re.search(zero, built.asm["ttgir"]), accumulator


@pytest.mark.parametrize(("arch", "kind"), [(80, "bf16"), (80, "fp16"), (90, "fp16"), (89, "fp8")])
def test_upstream_93_107_sums_are_int32_and_fp32(arch, kind):
    ptx = gate.compiled(variants.forward(kernel.CONFIGS[64][kind == "fp8"], 64, kind), arch).asm["ptx"]
    found = {
        tuple(re.findall(r"\.(\w+)", operation)[-(3 if "wgmma" in operation else 4) :])
        for operation in re.findall(r"(?:wgmma\.mma_async|mma)\.sync\.aligned[\w.]*", ptx)
    }
    value = {"fp8": "e4m3", "fp16": "f16", "bf16": "bf16"}[kind]
    tails = [("s32", "s8", "s8"), ("f32", value, value)]
    assert found == set(tails if arch == 90 else [(*tail, tail[0]) for tail in tails])
