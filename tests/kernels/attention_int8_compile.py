"""The configurations of quantised attention for the compile gate: `shipped` in the form of test_compile.py's.

fp8 variants are for compute capabilities from 8.9 on, and one tile replaces another for 12: `is_for` says which.
"""

from reattend.kernels.attention_int8 import kernel
from reattend.kernels.attention_int8 import kernel_quantize as quantize

# Arguments that are multiples of 16 in practice, which is what lets loads be wide.
STRIDES = tuple(f"stride_{name}" for name in ("qb", "qh", "qs", "kb", "kg", "kt", "vb", "vg", "vt", "xb", "xg", "xt"))


def forward(config, width, kind, *, causal=True, window=False, token=False, smooth_v=False):
    dtype = "fp8e4nv" if kind == "fp8" else kind
    pointers = {"p_q": "*i8", "p_k": "*i8", "p_v": f"*{dtype}", "p_out": f"*{'bf16' if kind == 'fp8' else kind}"}
    pointers |= dict.fromkeys(("p_q_scale", "p_shift", "p_k_scale", "p_lse", "p_v_scale", "p_v_mean"), "*fp32")
    pointers |= {"p_ranges": "*i32"}
    absent = {"p_v_scale": kind != "fp8", "p_v_mean": not smooth_v, "window": not window, "p_ranges": not window}
    constants = {name: None for name, is_absent in absent.items() if is_absent}
    constants |= {"CAUSAL": causal, "V_PACKED": kind == "fp8" or smooth_v, "PER_TOKEN": token, "V": width}
    sizes = {"BLOCK_M": config.block_m, "BLOCK_T": config.block_t, "BLOCK_D": width, "BLOCK_V": width}
    return kernel._forward_kernel, without(pointers, constants), constants | sizes, config


def without(pointers, constants):
    return {name: kind for name, kind in pointers.items() if name not in constants}


def quantizing(function, config, dtype, absent=(), **constants):
    """A quantisation kernel at its widest, with everything that may be absent but `absent`."""
    pointers = dict.fromkeys(("p_q", "p_k", "p_v", "p_x"), f"*{dtype}") | {"p_codes": "*i8", "p_ranges": "*i32"}
    pointers |= dict.fromkeys(("p_mean", "p_scale", "p_shift", "p_part", "factor", "scale"), "*fp32")
    pointers |= {"factor": "fp32", "scale": "fp32"}
    if function is quantize._values_kernel:
        pointers["p_codes"] = f"*{dtype}" if "p_scale" in absent else "*fp8e4nv"
    constants |= dict.fromkeys(absent) | {"WIDTH": 256, "BLOCK_T": config.block_t, "BLOCK_D": 256}
    named = {name: kind for name, kind in pointers.items() if name in function.arg_names}
    return function, without(named, constants), constants, config


def attending():
    for width, (half, eight, single) in kernel.CONFIGS.items():
        for kind, config in (("bf16", half), ("fp8", eight), ("fp32", single)):
            name = f"int8-attention-{width}-{kind}"
            yield f"{name}-all", forward(config, width, kind, causal=False)
            if kind != "fp32" and width > 64:  # the least registers to spare
                full = forward(config, width, kind, window=True, token=True, smooth_v=True)
                yield f"{name}-window-token-smooth", full
    yield "int8-attention-128-bf16", forward(kernel.CONFIGS[128][0], 128, "bf16")
    yield "int8-attention-128-fp8", forward(kernel.CONFIGS[128][1], 128, "fp8")
    yield "int8-attention-128-fp8-all:12", forward(kernel.FP8_128_ON_12, 128, "fp8", causal=False)
    yield "int8-attention-128-fp8-token:12", forward(kernel.FP8_128_ON_12, 128, "fp8", window=True, token=True)


def shipped():
    """Every tile with the least and the most that it does; quantisation at its widest."""
    yield from attending()
    yield "int8-attention-queries", quantizing(quantize._queries_kernel, quantize.QUERIES, "fp32")
    keys = quantizing(quantize._keys_kernel, quantize.KEYS, "fp32", CAUSAL=True, PER_TOKEN=False)
    yield "int8-attention-keys", keys
    for name, absent in (("smooth", ("p_scale",)), ("fp8", ())):
        values = quantizing(quantize._values_kernel, quantize.VALUES, "bf16", absent, CAUSAL=True)
        yield f"int8-attention-values-{name}", values
    parts = quantizing(quantize._columns_kernel, quantize.COLUMNS, "fp32", CAUSAL=True, BLOCK_P=quantize.PART)
    yield "int8-attention-columns", parts
    yield "int8-attention-merge", quantizing(quantize._merge_kernel, quantize.MERGE, "fp32", CAUSAL=True)


def is_for(name, arch):
    """Whether a variant runs on GPUs of this compute capability (times 10)."""
    if "fp8" in name and arch < 89:
        return False
    return "-128-fp8" not in name or name.endswith(":12") == (arch >= 120)
