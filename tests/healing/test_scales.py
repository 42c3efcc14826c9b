import math

import pytest
import torch

from reattend.healing.scales import Scaled, scale_of, scales_of


def test_scales_by_hand():
    rows = torch.tensor([[3e-7, -4e-7], [0.0, 0.0], [3.0, 4.0]])
    # rms 3.5e-7, which is 2^-21.4; of zeros the least; 3.5, which is 2^1.8.
    assert scale_of(rows).tolist() == [[2.0**-21], [2.0**-21], [4.0]]
    assert scale_of(torch.full((3,), 4096.0)).tolist() == [4096.0] * 3
    assert scale_of(torch.zeros(2, 3, 4)).tolist() == [[[1.0]], [[1.0]]]


def test_a_bias_has_the_scale_of_its_rows():
    made = {
        "a.weight": torch.tensor([[1e-6] * 4, [1.0] * 4]),
        "a.bias": torch.zeros(2),
        "b.bias": torch.full((3,), 2.0),
    }
    parameters = {name: torch.nn.Parameter(value) for name, value in made.items()}
    found = scales_of({name: parameters[name] for name in ("a.bias", "b.bias")}, parameters)
    assert found["a.bias"].tolist() == [2.0**-20, 1.0]
    assert found["b.bias"].tolist() == [2.0] * 3


def test_a_step_is_relative_to_each_row():
    """The first step of Adam moves every number by the rate, whatever its gradient: here by the rate times the scale."""
    value = torch.tensor([[1e-7, -2e-7, 1.7e-7], [0.3, 0.1, -0.2]])
    parameter = torch.nn.Parameter(value.clone())
    scaled = Scaled({"p": parameter}, {"p": scale_of(value)})
    optimiser = torch.optim.AdamW([parameter], lr=1e-3, weight_decay=0.0)
    parameter.grad = torch.tensor([[1e6, -3e6, 1e5], [0.1, 0.2, -0.3]])
    (gradient,) = scaled.gradients()
    assert gradient[0].tolist() == pytest.approx([1e6 * 2.0**-23, -3e6 * 2.0**-23, 1e5 * 2.0**-23])
    with scaled.divided():
        assert all(0.7 < rms < 1.42 for rms in parameter.detach().square().mean(1).sqrt().tolist())
        optimiser.step()
    moved = (parameter.detach() - value) / scale_of(value)
    expected = -1e-3 * torch.tensor([[1.0, -1, 1], [1, 1, -1]])
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=0)


def test_without_a_step_nothing_changes():
    value = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 9, 40)[:, None]
    parameter = torch.nn.Parameter(value.clone())
    parameter.grad = torch.zeros_like(value)
    with Scaled({"p": parameter}, {"p": scale_of(value)}).divided():
        assert not torch.equal(parameter, value)
    assert torch.equal(parameter, value)
    assert all(math.log2(s) % 1 == 0 for s in scale_of(value).flatten().tolist())
