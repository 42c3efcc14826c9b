"""Gates at their start, and how gamma follows from weights: by hand and by plain loops."""

import math

import pytest
import torch

from reattend.convert.clipped_softmax.formulas import BINS, MOST, gamma_of_length, gammas, mass_histogram
from reattend.convert.gates.formulas import GateShape, start_tensors, stored_openness
from reattend.modeling.portable.attention_reattend import GATE_KINDS, AttentionGate, clipped_attention

HIDDEN, HEADS, WIDTH, UNITS = 12, 3, 5, 2


def gate(kind, tensors=None):
    module = AttentionGate(kind, HIDDEN, HEADS, WIDTH, UNITS).double()
    shape = GateShape(kind, HIDDEN, HEADS, WIDTH, UNITS)
    module.load_state_dict(start_tensors(shape, 0.3, seed=1) if tensors is None else tensors)
    return module, shape


def sigma(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_a_gate_starts_open_by_pi0_for_any_input(kind):
    module, shape = gate(kind)
    x, found = torch.randn(2, 4, HIDDEN).double(), torch.randn(2, 4, HEADS, WIDTH).double()
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == shape.tensors()
    torch.testing.assert_close(module(x, found), 0.3 * found, rtol=1e-12, atol=0)


def test_pi0_one_half_is_exact_in_16_bit_and_others_are_what_is_stored():
    assert stored_openness(0.5, torch.bfloat16) == 0.5
    bias = torch.tensor(math.log(0.25 / 0.75)).to(torch.bfloat16)
    assert stored_openness(0.25, torch.bfloat16) == pytest.approx(sigma(float(bias)), rel=1e-12)
    assert stored_openness(0.25, torch.bfloat16) != 0.25


def logit_by_hand(kind, p, x, head, channel):
    """G(x) of one token by plain loops over numbers."""
    if kind in ("linear", "mlp"):
        part = HIDDEN // HEADS
        slice_ = x[head * part : (head + 1) * part]
        if kind == "mlp":
            rows = [
                sum(w * v for w, v in zip(row, slice_, strict=True)) + b
                for row, b in zip(p["in_weight"][head], p["in_bias"][head], strict=True)
            ]
            slice_ = [max(float(r), 0.0) for r in rows]
        return sum(float(w) * float(v) for w, v in zip(p["weight"][head], slice_, strict=True)) + float(
            p["bias"][head]
        )
    row = head * WIDTH + channel if kind == "elementwise" else head
    return float(p["proj.weight"][row] @ x + p["proj.bias"][row])


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_a_gate_is_what_the_paper_writes(kind):
    shape = GateShape(kind, HIDDEN, HEADS, WIDTH, UNITS)
    tensors = {name: torch.randn(size).double() for name, size in shape.tensors().items()}
    module, _ = gate(kind, tensors)
    x, found = torch.randn(2, HIDDEN).double(), torch.randn(2, HEADS, WIDTH).double()
    gated = module(x, found).detach()
    for token in range(2):
        for head in range(HEADS):
            for channel in range(WIDTH):
                pi = sigma(logit_by_hand(kind, tensors, x[token], head, channel))
                assert float(gated[token, head, channel]) == pytest.approx(
                    pi * float(found[token, head, channel]), rel=1e-10
                )


def test_heads_that_do_not_divide_the_input_are_refused():
    with pytest.raises(ValueError, match="5 heads don't divide 12"):
        AttentionGate("linear", 12, 5, 4)
    with pytest.raises(ValueError, match="'square' is none of"):
        AttentionGate("square", 12, 3, 4)
    assert AttentionGate("all_heads_linear", 12, 5, 4).proj.out_features == 5


def test_a_gate_learns_from_its_start():
    for kind in GATE_KINDS:
        module, _ = gate(kind)
        x, found = torch.randn(64, HIDDEN).double(), torch.randn(64, HEADS, WIDTH).double()  # no unit is dead for all
        module(x, found).square().sum().backward()
        last = module.proj.weight if hasattr(module, "proj") else module.weight
        assert float(last.grad.abs().min()) > 0, kind


def test_clipped_attention_by_hand():
    """Two keys, scores 0 and ln 3: weights 1/4 and 3/4."""
    query = torch.ones(1, 1, 1, 1).double()
    key = torch.tensor([0.0, math.log(3)]).double().view(1, 1, 2, 1)
    value = torch.tensor([10.0, 1.0]).double().view(1, 1, 2, 1)
    module = torch.nn.Module()
    module.is_causal = True

    def found(gamma, zeta=1.0):
        return float(
            clipped_attention(
                module, query, key, value, None, gamma=torch.tensor([gamma]).double(), zeta=zeta, scaling=1.0
            )[0]
        )

    assert found(0.0) == pytest.approx(10 / 4 + 3 / 4)
    # 1.2 p - 0.2: 0.1 and 0.7
    assert found(-0.2) == pytest.approx(1.0 + 0.7)
    # 2 p - 1 clips the first to 0
    assert found(-1.0) == pytest.approx(0.5)
    # (1.5 + 0.1) p - 0.1: 0.3 and 1.1, which is clipped to 1
    assert found(-0.1, 1.5) == pytest.approx(3.0 + 1.0)


def test_gamma_of_a_length():
    assert gamma_of_length(4.0, 512) == -4 / 512
    assert str(gamma_of_length(0.0, 512)) == "0.0"


def test_the_histogram_holds_all_weight_where_it_belongs():
    weight = torch.softmax(4 * torch.randn(3, 7, 50).double(), -1)
    mass = mass_histogram(weight)
    assert mass.shape == (3, BINS)
    torch.testing.assert_close(mass.sum(1), torch.full((3,), 7.0).double())
    edges = torch.exp(torch.linspace(-20, 0, BINS + 1).double())
    for n in (BINS // 2, BINS - 20):
        above = torch.where((weight > edges[n] * (1 + 1e-9)), weight, 0.0).sum((1, 2))
        torch.testing.assert_close(mass[:, n:].sum(1), above, rtol=1e-9, atol=1e-12)
    zeros = torch.tensor([[[0.0, 1.0]]]).double()
    assert mass_histogram(zeros)[0, -1] == 1


@pytest.mark.parametrize("zeta", [1.0, 1.1])
def test_what_gamma_zeroes_is_at_most_epsilon_and_nearly_so(zeta):
    weight = torch.softmax(4 * torch.randn(4, 64, 400).double(), -1)
    for epsilon in (1e-4, 1e-2):
        gamma, removed = gammas(mass_histogram(weight), epsilon, zeta)
        stretched = (zeta - gamma)[:, None, None] * weight + gamma[:, None, None]
        lost = torch.where(stretched <= 0, weight, 0.0).sum((1, 2)) / 64
        assert bool((lost <= epsilon).all())
        assert bool((lost > 0.6 * epsilon).all())
        torch.testing.assert_close(lost, removed, rtol=1e-9, atol=0)


def test_gamma_stays_within_what_the_paper_trained_with_and_is_zero_where_nothing_may_go():
    sharp = torch.zeros(1, 3, 100).double()
    sharp[:, :, 0] = 1.0
    gamma, removed = gammas(mass_histogram(sharp), 0.01, 1.0)
    assert -MOST <= float(gamma) < -0.9 * MOST
    assert float(removed) == 0
    faint = torch.full((1, 3, 2), 1e-12).double()
    assert gammas(mass_histogram(faint), 0.5, 1.0)[0].tolist() == [0.0]
