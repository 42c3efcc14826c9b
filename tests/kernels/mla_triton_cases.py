"""The Triton MLA decode in Triton's interpreter; run as a script with TRITON_INTERPRET=1 (see int8_triton_cases)."""

import sys

import torch
from triton.runtime.interpreter import GridExecutor

from reattend.kernels.mla_decode import kernel, mla_decode, reference

# batch, heads, queries, tokens, rank, rope: one tile and several, parts of unequal size, padded widths
SHAPES = [
    (1, 9, 1, 300, 24, 8),
    (2, 3, 2, 65, 16, 16),
    (1, 5, 5, 130, 40, 6),
    (2, 4, 1, 1, 16, 16),
    (1, 20, 1, 100, 136, 20),
]
real_empty = torch.empty


def poisoned(*args, **kwargs):
    return real_empty(*args, **kwargs).fill_(torch.nan)


def case(batch, heads, queries, tokens, rank, rope):
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(batch, heads, queries, rank), (batch, heads, queries, rope)]
    shapes += [(batch, tokens + 5, rank), (batch, tokens + 5, rope)]
    q, qr, c, k = (torch.randn(shape, generator=generator).half() for shape in shapes)
    seen = torch.rand(batch, 1, queries, tokens, generator=generator) < 0.7
    seen[..., 0] = True
    return (q, qr, c[:, :tokens], k[:, :tokens]), seen


def main():
    torch.empty = poisoned
    count = 0
    for programs in (1, 7, kernel._PROGRAMS):
        kernel._PROGRAMS = programs
        for shape in SHAPES:
            tensors, seen = case(*shape)
            for mask in (None, seen, seen[:1] if shape[0] == 1 else seen[:1].expand_as(seen)):
                got = mla_decode(*tensors, scale=0.3, mask=mask, backend="triton").double()
                want = reference.mla_decode(*(t.double() for t in tensors), scale=0.3, mask=mask)
                error = float((got - want).norm() / want.norm())
                assert error < 2e-3, (programs, shape, error)
                count += 1
    hidden(*case(*SHAPES[1]))
    many_sequences()
    far_mask()
    print(f"{count} cases")


def hidden(tensors, seen):
    seen[0] = False
    assert mla_decode(*tensors, scale=1.0, mask=seen, backend="triton").isfinite().all()


def many_sequences():
    """CUDA starts no more than 65535 programs along any axis but the first."""
    grids = []
    launch, GridExecutor.__call__ = GridExecutor.__call__, lambda self, *_, **__: grids.append(self.grid)
    tensors, _ = case(65536, 1, 1, 2, 16, 8)
    mla_decode(*tensors, scale=1.0, backend="triton")
    GridExecutor.__call__ = launch
    assert len(grids) == 2
    assert all(max(grid[1:], default=1) < 65536 <= grid[0] for grid in grids), grids


def far_mask():
    """The last row of a mask lies 2^31 bytes behind the first; the memory between is never touched, nor taken."""
    tensors, seen = case(1, 1, 3, 40, 16, 16)
    apart = real_empty(1, 1, 3, 1 << 30, dtype=torch.bool)[..., :40].copy_(seen)
    want = mla_decode(*tensors, scale=0.3, mask=seen, backend="triton")
    assert torch.equal(mla_decode(*tensors, scale=0.3, mask=apart, backend="triton"), want)


if __name__ == "__main__":
    sys.exit(main())
