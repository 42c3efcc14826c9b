"""Shared decode against the reference of attention, which knows nothing of leaders."""

import pytest
import torch
from interpreter import run_in_interpreter

from reattend.kernels.attention.options import Options
from reattend.kernels.attention.reference import attention as reference
from reattend.kernels.shared_decode import follow, lead

SHAPES = [(1, 9, 3, 300, 24, 24), (2, 4, 4, 65, 16, 40), (1, 5, 1, 7, 72, 16), (2, 4, 2, 1, 16, 16)]
NEAR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def case(batch, heads, groups, tokens, width, value_width, dtype=torch.float64):
    shapes = ((batch, heads, 1, width), (batch, groups, tokens, width), *[(batch, groups, tokens, value_width)] * 2)
    return [torch.randn(shape).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_torch_route(shape, dtype):
    q, k, v, other = case(*shape, dtype)
    mask = torch.rand(shape[0], 1, 1, shape[3]) < 0.7
    mask[-1] = False  # a sequence that sees nothing
    for seen in (None, mask):
        output, row = lead(q, k, v, scale=0.3, mask=seen)
        options = Options(causal=False, scale=0.3, mask=seen)
        want, lse = reference(q.double(), k.double(), v.double(), options)
        assert output.dtype == dtype
        assert torch.allclose(output.double(), want, atol=NEAR[dtype], rtol=NEAR[dtype])
        assert torch.allclose(row.lse.double(), lse[:, :, 0], atol=1e-4 if dtype != torch.float64 else 1e-12)
        want, _ = reference(q.double(), k.double(), other.double(), options)
        assert torch.allclose(follow(row, other).double(), want, atol=NEAR[dtype], rtol=NEAR[dtype])


def test_shapes_that_do_not_fit():
    q, k, v, _ = case(1, 4, 2, 6, 8, 8)
    _, row = lead(q, k, v, scale=1.0)
    with pytest.raises(ValueError, match="query"):
        lead(q.expand(1, 4, 2, 8), k, v, scale=1.0)
    with pytest.raises(ValueError, match="query"):
        lead(q[:, :3], k, v, scale=1.0)
    with pytest.raises(ValueError, match=r"value \(1, 2, 5, 8\) is not"):
        lead(q, k, v[:, :, :5], scale=1.0)
    with pytest.raises(ValueError, match="is not"):
        follow(row, v[:, :, :5])
    with pytest.raises(ValueError, match="don't divide among 3"):
        follow(row, v[:, :1].expand(1, 3, 6, 8))
    with pytest.raises(ValueError, match="backend='cuda'"):
        follow(row, v, backend="cuda")
    with pytest.raises(RuntimeError, match="can't run"):
        follow(row, v.float(), backend="triton")


def test_triton_in_the_interpreter():
    pytest.importorskip("triton")
    printed = run_in_interpreter("shared_triton_cases.py")
    assert "48 cases" in printed
