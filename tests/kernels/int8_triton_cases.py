"""Every variant of the Triton kernels in Triton's interpreter; run as a script with TRITON_INTERPRET=1.

A process of its own: the variable is read when a kernel is decorated, and must not reach other tests.
"""

import sys

import torch

from reattend.kernels.int8_linear import Outliers, int8_linear, kernel, reference

real_empty = torch.empty


def poisoned(*args, **kwargs):
    made = real_empty(*args, **kwargs)
    return made.fill_(torch.nan) if made.is_floating_point() else made.fill_(99)


def case(rows, inputs, outputs, columns, bias, dtype):
    generator = torch.Generator().manual_seed(rows * 1000 + inputs)
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    if rows > 2:
        x[1] = 0
    codes = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, generator=generator)
    scale = torch.rand(outputs, generator=generator) * 0.01
    bias = torch.randn(outputs, generator=generator) if bias else None
    if columns:
        x[:, columns] *= 20
        picked = torch.tensor(columns)
        return x, codes, scale, bias, Outliers(picked, codes[:, picked].float() * scale[:, None])
    return x, codes, scale, bias, None


def close(got, want, dtype, what):
    error = (got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)
    limit = {torch.float16: 1e-3, torch.float32: 1e-6}[dtype]  # roundings of the output, as codes are the same
    assert error < limit, f"{what}: {error:.2e}"


def main():
    torch.empty = poisoned
    count = 0
    shapes = [(1, 33, 5), (3, 100, 17), (17, 64, 70), (63, 130, 33), (257, 40, 20)]
    for i, (rows, inputs, outputs) in enumerate(shapes):
        many = (list(range(20)), list(range(inputs))) if rows < 60 else ()
        for columns in ([], [3], [0, 7, 8, inputs - 1], *many):
            dtype = torch.float16 if (i + len(columns)) % 2 else torch.float32
            x, codes, scale, bias, outliers = case(rows, inputs, outputs, columns, i % 3 != 0, dtype)
            got = int8_linear(x, codes, scale, bias, outliers=outliers, backend="triton")
            close(got, reference.w8a8(x, codes, scale, bias, outliers), dtype, (rows, inputs, outputs, columns))
            count += 1
        got = int8_linear(x, codes, scale, bias, activations="none", backend="triton")
        close(got, reference.w8a16(x, codes, scale, bias), dtype, ("w8a16", rows, inputs, outputs))
        got = int8_linear(x, codes, scale, bias, threshold=6.0, backend="triton")
        want = reference.w8a8(x, codes, scale, bias, reference.dynamic_outliers(x, codes, scale, 6.0))
        close(got, want, dtype, ("dynamic", rows, inputs, outputs))
        count += 2
    rows_of_codes()
    strided()
    poisoned_rows()
    print(f"{count} cases")


def rows_of_codes():
    x = torch.randn(40, 77)
    x[5] = 0
    x[6] = 1e-35
    codes, scale = kernel.quantize_rows(x, torch.tensor([2, 76]))
    want_codes, want_scale = reference.quantize_rows(x, torch.tensor([2, 76]))
    assert torch.equal(scale, want_scale)
    assert torch.equal(codes, want_codes)


def strided():
    """Bias, columns and outlier weights as slices of something larger leave them."""
    x, codes, scale, bias, _ = case(7, 48, 12, [], True, torch.float32)
    bias, weight = bias.repeat_interleave(2)[::2], torch.randn(3, 12).T
    outliers = Outliers(torch.tensor([2, -1, 9, -1, 40])[::2], weight)
    got = int8_linear(x, codes, scale, bias, outliers=outliers, backend="triton")
    close(got, reference.w8a8(x, codes, scale, bias, outliers), torch.float32, "strided")
    got = int8_linear(x, codes, scale, bias, activations="none", backend="triton")
    close(got, reference.w8a16(x, codes, scale, bias), torch.float32, "strided, w8a16")


def poisoned_rows():
    x = torch.randn(4, 64)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    y = int8_linear(x, torch.ones(8, 64, dtype=torch.int8), torch.ones(8), backend="triton")
    assert y[[1, 2]].isnan().all()
    assert y[[0, 3]].isfinite().all()


if __name__ == "__main__":
    sys.exit(main())
