"""int8 linears."""

from importlib.util import find_spec

import torch
from timing import Bench, Calls, check
from torch.nn.functional import linear

from reattend.kernels.int8_linear import Outliers, int8_linear, reference

ODD = [(1, 33, 5), (3, 100, 17), (17, 64, 70), (63, 130, 33), (257, 4100, 300)]
LAYERS = [(4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192)]  # O x I
ROWS = (1, 16, 256, 4096)
COLUMNS = 16  # outlier columns of a layer


def bench_int8(bench: Bench, small: bool) -> None:
    """Check, then time."""
    print(check_int8(bench, bench.dtypes, ODD[:3] if small else ODD), "int8 variants are right")
    time_int8(bench, bench.timed, *(([(48, 64)], (1, 20)) if small else (LAYERS, ROWS)))


def check_int8(bench: Bench, dtypes: list[torch.dtype], shapes: list[tuple[int, int, int]]) -> int:
    """Every variant on odd shapes, against sums in fp64; returns the number of comparisons."""
    count = 0
    for rows, inputs, outputs in shapes:
        codes, scale = bench.codes(outputs, inputs)
        columns = torch.tensor([0, inputs // 2, inputs - 1], device=bench.device)
        outliers = Outliers(columns, codes[:, columns].float() * scale[:, None])
        for dtype in dtypes:
            x, bias = bench.numbers(rows, inputs, dtype=dtype), bench.numbers(outputs)
            x[:, columns] *= 20
            here = (rows, inputs, outputs, dtype)
            plain, found = (x, codes, scale, bias), reference.dynamic_outliers(x, codes, scale, 6.0)
            check(run(*plain), reference.w8a8(*plain), ("W8A8", here))
            check(run(*plain, outliers=outliers), reference.w8a8(*plain, outliers), ("static", here))
            check(run(*plain, threshold=6.0), reference.w8a8(*plain, found), ("dynamic", here))
            check(run(*plain, activations="none"), reference.w8a16(*plain), ("W8A16", here))
            count += 4
    return count


def run(*arguments: object, **options: object) -> torch.Tensor:
    """The Triton route of `int8_linear`."""
    return int8_linear(*arguments, backend="triton", **options)  # type: ignore[arg-type]


def time_int8(bench: Bench, dtype: torch.dtype, layers: list[tuple[int, int]], rows: tuple[int, ...]) -> None:
    """One layer at a time: how many times as fast as torch's own linear in the same dtype."""
    names = ["W8A8", "static", "dynamic", "W8A16", *(["bitsandbytes"] if find_spec("bitsandbytes") else [])]
    print(f"\nO x I            rows | {dtype} ms | as fast: {'  '.join(f'{name:>8}' for name in names)}")
    for outputs, inputs in layers:
        for count in rows:
            t = bench.medians(int8_calls(bench, dtype, (outputs, inputs), count))
            ratios = "  ".join(f"{t['torch'] / t[n]:8.2f}" if n in t else f"{'-':>8}" for n in names)
            slower = max(t["static"], t["dynamic"]) / t["W8A8"]
            print(
                f"{outputs:6} x {inputs:6} {count:6} | {t['torch']:10.4f} | {ratios}; decomposed {slower:.2f} x W8A8",
                flush=True,
            )


def int8_calls(bench: Bench, dtype: torch.dtype, shape: tuple[int, int], rows: int) -> Calls:
    """The candidates of one layer."""
    outputs, inputs = shape
    codes, scale = bench.codes(outputs, inputs)
    weight, x = (codes.float() * scale[:, None]).to(dtype), bench.numbers(rows, inputs, dtype=dtype)
    columns = torch.arange(0, inputs, -(-inputs // COLUMNS), device=bench.device)
    x[:, columns] *= 20
    outliers = Outliers(columns, weight[:, columns].contiguous())
    calls: Calls = {
        "torch": lambda: linear(x, weight),
        "W8A8": lambda: run(x, codes, scale),
        "static": lambda: run(x, codes, scale, outliers=outliers),
        "dynamic": lambda: run(x, codes, scale, threshold=20.0),
        "W8A16": lambda: run(x, codes, scale, activations="none"),
    }
    if find_spec("bitsandbytes") and bench.device != "cpu":
        import bitsandbytes

        layer = bitsandbytes.nn.Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False, threshold=0.0)
        layer.weight = bitsandbytes.nn.Int8Params(weight.cpu().half(), requires_grad=False, has_fp16_weights=False)
        layer = layer.to(bench.device)
        half = x.half()
        calls["bitsandbytes"] = lambda: layer(half)
    return calls
