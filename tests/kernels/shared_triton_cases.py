"""Shared decode in Triton's interpreter; run as a script with TRITON_INTERPRET=1 (see int8_triton_cases)."""

import sys

import torch

from reattend.kernels.attention.options import Options
from reattend.kernels.attention.reference import attention as reference
from reattend.kernels.shared_decode import follow, kernel, lead

# batch, heads, groups, tokens, width, value width: one tile and several, runs of unequal size, padded widths
SHAPES = [(1, 9, 3, 300, 24, 24), (2, 4, 4, 65, 16, 40), (1, 20, 1, 130, 72, 16), (2, 4, 2, 1, 16, 16)]
real_empty = torch.empty


def poisoned(*args, **kwargs):
    return real_empty(*args, **kwargs).fill_(torch.nan)


def case(batch, heads, groups, tokens, width, value_width, dtype):
    generator = torch.Generator().manual_seed(tokens)
    q, k, v, other = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in (
            (batch, heads, 1, width),
            (batch, groups, tokens + 3, width),
            (batch, groups, tokens + 3, value_width),
            (batch, groups, tokens, value_width),
        )
    )
    mask = torch.rand(batch, 1, 1, tokens, generator=generator) < 0.7
    mask[0] = False  # a sequence that sees nothing
    if batch == 1:
        mask[..., 0] = True
    return q, k[:, :, :tokens], v[:, :, :tokens], other, mask


def main():
    torch.empty = poisoned
    count = 0
    for run in (64, 128, kernel._RUN):
        kernel._RUN = run
        for shape in SHAPES:
            for dtype, near in ((torch.float32, 2e-5), (torch.float16, 4e-3)):
                q, k, v, other, every = case(*shape, dtype)
                for mask in (None, every):
                    found, row = lead(q, k, v, scale=0.3, mask=mask, backend="triton")
                    options = Options(causal=False, scale=0.3, mask=mask)
                    exact = (part.double() for part in (q, k, v))
                    want, lse = reference(*exact, options)
                    assert torch.allclose(found.double(), want, atol=near, rtol=near), (shape, dtype, run)
                    assert torch.allclose(row.lse.double(), lse[:, :, 0], atol=1e-2 if dtype.itemsize == 2 else 1e-5)
                    want, _ = reference(q.double(), k.double(), other.double(), options)
                    found = follow(row, other, backend="triton")
                    assert torch.allclose(found.double(), want, atol=near, rtol=near), (shape, dtype, run)
                    count += 1
    print(count, "cases")


if __name__ == "__main__":
    sys.exit(main())
