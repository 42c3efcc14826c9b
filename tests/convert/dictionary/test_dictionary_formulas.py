import itertools

import pytest
import torch
from second_moments import moments

from reattend.convert.dictionary.allocation import Curve, Option, allocate
from reattend.convert.dictionary.formulas import (
    fit_coefficients,
    low_rank,
    matrix_pca,
    root,
    shared_energy,
    tail,
)
from reattend.convert.dictionary.moments import attention_received
from reattend.convert.dictionary.solving import Block
from reattend.kernels.attention import Options


def test_error_of_pca_is_what_eigenvalues_are_left_out():
    weight = torch.randn(6, 5, 7).double()
    for count in range(1, 7):
        atoms, coefficients, values = matrix_pca(weight, count)
        error = weight - torch.einsum("ls,smn->lmn", coefficients, atoms)
        assert float(error.square().sum()) == pytest.approx(float(values[count:].sum()), abs=1e-10)
        flat = atoms.flatten(1)
        assert torch.allclose(flat @ flat.T, torch.eye(count).double(), atol=1e-10)


def test_as_many_atoms_as_layers_lose_nothing():
    weight = torch.randn(4, 5, 7).double()
    for solver in ("pca", "als"):
        block = Block("q_proj", (0, 1, 2, 3), weight, moments(4, 7))
        shared = block.atoms(solver, 4, 1, [1.0, 2.0, 3.0, 4.0])
        rebuilt = block.rebuilt(solver, shared, {unit.name: 1 for unit in block.units(solver)})
        assert torch.allclose(rebuilt, weight, atol=1e-7), solver


def test_coefficients_are_those_of_least_squares():
    """Against torch's lstsq on inputs whose second moment is the one given."""
    weight, atoms, x = torch.randn(1, 4, 5).double(), torch.randn(2, 4, 5).double(), torch.randn(9, 5).double()
    found = fit_coefficients(weight, (x.T @ x)[None], atoms)
    table = torch.stack([(x @ atom.T).flatten() for atom in atoms], 1)
    want = torch.linalg.lstsq(table, (x @ weight[0].T).flatten()[:, None]).solution[:, 0]
    assert torch.allclose(found[0], want, atol=1e-8)


def test_low_rank_is_the_best_for_these_inputs():
    weight, second = torch.randn(6, 5).double(), moments(1, 5)[0]
    factor = root(second)
    errors = tail(weight, factor)
    for rank in range(6):
        up, down = low_rank(weight, factor, rank)
        assert up.shape == (6, rank)
        assert down.shape == (rank, 5)
        error = weight - up @ down
        assert float((error @ second @ error.T).trace()) == pytest.approx(float(errors[rank]), rel=1e-4, abs=1e-6)
        if rank:
            other = torch.linalg.svd(weight)
            plain = weight - other.U[:, :rank] * other.S[:rank] @ other.Vh[:rank]
            assert float(errors[rank]) <= float((plain @ second @ plain.T).trace()) * (1 + 1e-6)


def test_channels_that_never_fired_have_a_root():
    second = torch.diag(torch.tensor([1.0, 0.0, 4.0]).double())
    factor = root(second)
    assert torch.allclose(factor @ factor.T, second, atol=1e-6)
    assert bool(torch.isfinite(torch.linalg.inv(factor)).all())
    with pytest.raises(FloatingPointError, match="NaN or inf"):
        root(torch.full((2, 2), float("nan")).double())


def test_orthogonal_matrices_share_nothing_but_norms():
    weight = torch.zeros(4, 2, 2).double()
    for i, norm in enumerate((1.0, 3.0, 2.0, 1.0)):
        weight[i, i // 2, i % 2] = norm
    captured, expected = shared_energy(weight, 2)
    assert captured == pytest.approx(13 / 15)
    assert expected == pytest.approx(13 / 15)
    alike = torch.randn(1, 3, 3).double().expand(4, 3, 3)
    assert shared_energy(alike, 1) == pytest.approx((1.0, 0.25))


def test_a_basis_is_shared_by_stacked_layers():
    """Two layers whose rows span the same two directions: rank 2 is exact for both."""
    basis = torch.randn(2, 6).double()
    weight = torch.stack([torch.randn(4, 2).double() @ basis for _ in range(2)])
    block = Block("v_proj", (3, 4), weight, moments(2, 6))
    (unit,) = block.units("basis")
    assert unit.name == "v_proj.3"
    made = block.rebuilt("basis", {}, {unit.name: 2})
    assert torch.allclose(made, weight, atol=1e-8)
    assert [u.layers for u in Block("o_proj", (3, 4), weight, moments(2, 6)).units("basis")] == [(3,), (4,)]


def alone(curves):
    return {name: [Option(0, {name: curve})] for name, curve in curves.items()}


def test_allocation_is_the_best_of_all():
    """Where each rank gains less than the one before: no worse than the best with one rank's numbers less."""
    curves = {}
    for name, shape in (("a", (4, 6)), ("b", (5, 5)), ("c", (8, 3))):
        gains = torch.rand(4).double().sort().values
        curves[name] = Curve(torch.cat([torch.zeros(1).double(), gains.cumsum(0)]).flip(0), shape, whole=False)
    options = {name: curve.options for name, curve in curves.items()}

    def total(part, picks):
        return sum(float(options[name][part][pick]) for name, pick in zip(options, picks, strict=True))

    every = list(itertools.product(*(range(len(cost)) for cost, _ in options.values())))
    for budget in range(42, 90, 7):
        picked = [rank - 1 for rank in allocate(alone(curves), budget)[1].values()]
        assert total(0, picked) <= budget
        assert total(1, picked) <= min(total(1, p) for p in every if total(0, p) <= budget - 11) + 1e-12


def test_a_budget_for_all_keeps_all_whole():
    curves = {"a": Curve(torch.tensor([2.0, 1.0, 0.5, 0.1, 0.0]), (4, 4)), "b": Curve(torch.zeros(3), (2, 2))}
    assert allocate(alone(curves), 20)[1]["a"] is None
    assert allocate(alone(curves), 15)[1]["a"] == 1  # rank 2 would take as much as the whole
    assert allocate(alone(curves), 12)[1] == {"a": 1, "b": 1}
    with pytest.raises(ValueError, match="12 numbers are the least, 11 may be kept"):
        allocate(alone(curves), 11)


def test_what_is_shared_is_taken_where_it_is_worth_its_numbers():
    """By hand: two matrices of 4 x 4, each 8 numbers at rank 1, or 3 numbers shared and nothing left at rank 1."""
    apart = {"a": Curve(torch.tensor([9.0, 4.0, 0.0]), (4, 4)), "b": Curve(torch.tensor([9.0, 4.0, 0.0]), (4, 4))}
    shared = {name: Curve(torch.tensor([1.0, 0.5, 0.0]), (4, 4), whole=False) for name in apart}
    options = {"q": [Option(0, apart), Option(3, shared)]}
    assert allocate(options, 32) == ({"q": 0}, {"a": None, "b": None})
    assert allocate(options, 24) == ({"q": 1}, {"a": 1, "b": 1})
    assert allocate(options, 18) == ({"q": 0}, {"a": 1, "b": 1})
    with pytest.raises(ValueError, match="16 numbers are the least"):
        allocate(options, 15)


def test_attention_received_by_hand():
    """All scores alike: token t gets 1/(s+1) from each row s >= t."""
    query, key = torch.zeros(1, 4, 3, 2), torch.zeros(1, 2, 3, 2)
    found = attention_received(query, key, Options())
    assert torch.allclose(found, torch.tensor([1 + 1 / 2 + 1 / 3, 1 / 2 + 1 / 3, 1 / 3]))
