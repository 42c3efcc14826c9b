"""Linears on a dictionary's atoms and factors."""

import torch
from timing import Bench, check
from torch.nn.functional import linear

from reattend.kernels.dictionary_linear import dictionary_linear

# rows, inputs, outputs, rank, atoms
ODD = [(1, 40, 24, 3, 1), (17, 72, 130, 20, 3), (130, 96, 200, 90, 4)]
TIMED = [(rows, 4096, 4096, 820, atoms) for atoms in (1, 2, 4) for rows in (1, 16, 2048)]


def bench_dictionary(bench: Bench, small: bool) -> None:
    """Check, then time."""
    print(check_dictionary(bench, ODD[:2] if small else ODD), "dictionary variants are right")
    time_dictionary(bench, [(3, 32, 40, 8, 2)] if small else TIMED)


def tensors_of(bench: Bench, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """x, up, down, atoms, coefficients and bias, as `dictionary_linear` takes them; outputs are of a size of one."""
    rows, inputs, outputs, rank, atoms = shape
    shapes = ((rows, inputs), (outputs, rank), (rank, inputs), (atoms, outputs, inputs), (atoms,), (outputs,))
    x, *parts = (bench.numbers(*one, dtype=dtype) for one in shapes)
    return [x * inputs**-0.5, parts[0] * rank**-0.5, *parts[1:]]


def check_dictionary(bench: Bench, shapes: list[tuple[int, ...]]) -> int:
    """Odd shapes against the weight written out in fp64; returns the number of comparisons."""
    count = 0
    for shape in shapes:
        for dtype in bench.dtypes:
            tensors = tensors_of(bench, shape, dtype)
            x, up, down, atoms, coefficients, bias = (tensor.double() for tensor in tensors)
            want = linear(x, torch.tensordot(coefficients, atoms, 1) + up @ down, bias)
            check(dictionary_linear(*tensors, backend="triton"), want, ("dictionary_linear", shape, dtype))
            count += 1
    return count


def time_dictionary(bench: Bench, shapes: list[tuple[int, ...]]) -> None:
    """Beside a dense weight, and the weight added up in each call."""
    print("\nrows atoms | dense ms | as fast: triton, added up in each call")
    for shape in shapes:
        tensors = tensors_of(bench, shape, bench.timed)
        dense = bench.numbers(shape[2], shape[1], dtype=bench.timed)
        t = bench.medians(
            {
                "dense": lambda x=tensors[0], w=dense: linear(x, w),
                "triton": lambda parts=tensors: dictionary_linear(*parts, backend="triton"),
                "torch": lambda parts=tensors: dictionary_linear(*parts, backend="torch"),
            }
        )
        ratios = f"{t['dense'] / t['triton']:6.2f} {t['dense'] / t['torch']:6.2f}"
        print(f"{shape[0]:4} {shape[4]:5} | {t['dense']:8.3f} | {ratios}", flush=True)
