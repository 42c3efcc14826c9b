"""The Triton dictionary linear in Triton's interpreter; run as a script with TRITON_INTERPRET=1 (int8_triton_cases)."""

import itertools
import sys

import torch

from reattend.kernels.dictionary_linear import dictionary_linear, kernel
from reattend.kernels.output_tiles import Config

# rows, inputs, outputs, rank, atoms: one tile and several, none whole, ranks below and above a tile
SHAPES = [(1, 7, 5, 1, 1), (3, 64, 64, 64, 2), (17, 70, 130, 20, 3), (40, 33, 40, 90, 4)]
real_empty = torch.empty


def poisoned(*args, **kwargs):
    return real_empty(*args, **kwargs).fill_(torch.nan)


def case(rows, inputs, outputs, rank, atoms, dtype):
    generator = torch.Generator().manual_seed(rows)
    shapes = [(rows, inputs + 3), (outputs, rank), (rank, inputs), (atoms, outputs, inputs), (atoms,), (outputs,)]
    x, *rest = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return x[:, :inputs], *rest  # rows lie apart


def wanted(x, up, down, atoms, coefficients, bias):
    x, up, down, atoms, coefficients = (tensor.double() for tensor in (x, up, down, atoms, coefficients))
    weight = sum(c * atom for c, atom in zip(coefficients, atoms, strict=True)) + up @ down
    return x @ weight.T + (0 if bias is None else bias.double())


def main():
    torch.empty = poisoned
    kernel.LARGE = Config(32, 32, 16, 4, 1)  # as it is, the interpreter takes minutes
    count = 0
    for shape, dtype, biased in itertools.product(SHAPES, (torch.float32, torch.float16), (True, False)):
        *tensors, bias = case(*shape, dtype)
        bias = bias if biased else None
        got = dictionary_linear(*tensors, bias, backend="triton").double()
        want = wanted(*tensors, bias)
        error = float((got - want).norm() / want.norm())
        assert error < (1e-5 if dtype == torch.float32 else 2e-3), (shape, dtype, error)
        count += 1
    x, *rest, bias = case(*SHAPES[0], torch.float32)
    assert dictionary_linear(x[:0], *rest, backend="triton").shape == (0, 5)
    print(f"{count} cases")


if __name__ == "__main__":
    sys.exit(main())
