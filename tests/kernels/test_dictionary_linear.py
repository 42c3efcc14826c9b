"""A linear on a dictionary against the weight written out."""

import pytest
import torch
from interpreter import run_in_interpreter

from reattend.kernels.dictionary_linear import dictionary_linear


def case(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 6), (5, 4), (4, 6), (3, 5, 6), (3,), (5,)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def test_by_hand():
    atoms = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 0.0]]])
    up, down, x = torch.tensor([[1.0], [1.0]]), torch.tensor([[2.0, 0.0]]), torch.tensor([1.0, 10.0])
    # weight = 3 D_1 + 5 D_2 + up down = [[5, 5], [2, 3]]
    assert dictionary_linear(x, up, down, atoms, torch.tensor([3.0, 5.0])).tolist() == [55.0, 32.0]
    assert dictionary_linear(x, up, down, atoms, torch.tensor([3.0, 5.0]), torch.ones(2)).tolist() == [56.0, 33.0]


def test_it_has_gradients():
    tensors = [tensor.requires_grad_() for tensor in case()]
    assert torch.autograd.gradcheck(dictionary_linear, tensors)


def test_in_the_interpreter():
    pytest.importorskip("triton")
    printed = run_in_interpreter("dictionary_triton_cases.py")
    assert "16 cases" in printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 5)}, "x .* does not fit atoms"),
        ({1: torch.zeros(5, 3)}, "factors .* do not fit"),
        ({2: torch.zeros(4, 5)}, "factors .* do not fit"),
        ({3: torch.zeros(3, 6, 5).mT}, "not .S, O, I., contiguous"),
        ({4: torch.zeros(2)}, "a coefficient for each atom"),
        ({5: torch.zeros(6)}, "a bias for each output"),
        ({5: torch.zeros(5).half()}, "one dtype"),
    ],
)
def test_refused(change, message):
    tensors = [change.get(i, tensor) for i, tensor in enumerate(case(torch.float32))]
    with pytest.raises(ValueError, match=message):
        dictionary_linear(*tensors)


def test_backends_that_cannot_run():
    pytest.importorskip("triton")
    tensors = case(torch.float32)
    with pytest.raises(RuntimeError, match="tensors are on cpu"):
        dictionary_linear(*tensors, backend="triton")
    with pytest.raises(RuntimeError, match="gradients"):
        dictionary_linear(*(tensor.requires_grad_() for tensor in tensors), backend="triton")
    with pytest.raises(RuntimeError, match="float64"):
        dictionary_linear(*case(), backend="triton")
    with pytest.raises(ValueError, match="backend='native'"):
        dictionary_linear(*tensors, backend="native")
