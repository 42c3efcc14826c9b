import itertools

import pytest
import torch
from second_moments import moments

from reattend.convert.dictionary.alternating import Alternating, alternate, alternated
from reattend.convert.dictionary.formulas import matrix_pca
from reattend.convert.dictionary.solving import Block


def error_of(weight, second, atoms, coefficients, ranks):
    """The expected square error with the best factors of each rank, by the singular values of what is left."""
    left = weight - torch.einsum("ls,smn->lmn", coefficients, atoms)
    return sum(
        float(torch.linalg.svdvals(error @ torch.linalg.cholesky(s))[rank:].square().sum())
        for error, s, rank in zip(left, second, ranks, strict=True)
    )


@pytest.mark.parametrize("ranks", [[0] * 8, [2] * 8, [0, 1, 2, 3, 0, 1, 2, 5]])
def test_the_objective_never_rises_and_is_the_error_of_what_is_kept(ranks):
    weight, second = torch.randn(8, 6, 5).double(), moments(8, 5)
    search = Alternating(weight, second)
    for begun in search.starts(3, ranks):
        places = alternate(search, begun)
        assert all(b.objective <= a.objective * (1 + 1e-9) for a, b in itertools.pairwise(places))
        check(weight, second, ranks, places[-1])


def check(weight, second, ranks, end):
    kept = torch.einsum("ls,smn->lmn", end.coefficient_LS, end.atoms_SMN) + end.factored_LMN
    error = weight - kept
    assert end.objective == pytest.approx(float(torch.einsum("lmn,lnk,lmk->", error, second, error)), rel=1e-4)
    assert [torch.linalg.matrix_rank(part, rtol=1e-9) for part in end.factored_LMN] == ranks
    atoms, coefficients, _ = matrix_pca(weight, 3)
    assert end.objective < 0.8 * error_of(weight, second, atoms, coefficients, ranks)
    best = error_of(weight, second, end.atoms_SMN, end.coefficient_LS, ranks)
    assert end.objective == pytest.approx(best, rel=0.02)  # what power iteration still leaves to singular vectors


def test_atoms_are_found_for_what_factors_leave():
    """Layers share a part that inputs hardly excite, and each has much of its own in two directions that they do."""
    shared, second = torch.randn(5, 6).double(), torch.diag(torch.tensor([100.0, 100, 1, 1, 1, 1]).double())
    own = torch.zeros(4, 5, 6).double()
    own[:, :, :2] = torch.randn(4, 5, 2).double() * 5
    search = Alternating(own + torch.rand(4, 1, 1).double().add(0.5) * shared, second.expand(4, 6, 6))
    assert alternated(search, 1, [2] * 4).objective < 1e-6 * float(own.square().sum())


def test_as_many_atoms_as_layers_leave_nothing():
    weight = torch.randn(3, 4, 5).double()
    search = Alternating(weight, moments(3, 5))
    for begun in search.starts(3, [1, 0, 4]):
        assert begun.objective == pytest.approx(0, abs=1e-18)


def test_layers_alike_but_for_rows_are_found_by_atoms_first():
    """Factors of each layer alone would hold the odd rows, and leave to the atom what no two layers share."""
    shared = torch.randn(6, 8).double()
    weight = shared * torch.tensor([1.0, 1.5, 2.0, 0.7]).double()[:, None, None]
    for i in range(4):
        weight[i, i] += 5 * torch.randn(8).double()
    search = Alternating(weight, torch.eye(8).double().expand(4, 8, 8))
    assert alternated(search, 1, [4] * 4).objective < 1e-6 * float(weight.square().sum())


def test_als_counts_layers_by_their_weights():
    """Two layers at right angles and one atom: it goes to the layer that counts more."""
    weight = torch.zeros(2, 2, 2).double()
    weight[0, 0, 0], weight[1, 1, 1] = 1.0, 1.1
    block = Block("q_proj", (0, 1), weight, torch.eye(2).double().expand(2, 2, 2) / 2)
    for weights, layer in (([9.0, 1.0], 0), ([1.0, 9.0], 1)):
        shared = block.atoms("als", 1, 0, weights)
        made = torch.einsum("ls,smn->lmn", shared["coefficients"], shared["atoms"])
        assert torch.allclose(made[layer], weight[layer], atol=1e-6), weights
        assert torch.allclose(made[1 - layer], torch.zeros(2, 2).double(), atol=1e-6), weights


def test_layers_without_effect_are_still_made():
    weight = torch.randn(3, 4, 5).double()
    for weights in ([0.0, 0.0, 0.0], [1.0, 0.0, 1e-300]):
        shared = Block("v_proj", (0, 1, 2), weight, moments(3, 5)).atoms("als", 2, 1, weights)
        assert all(bool(torch.isfinite(part).all()) for part in shared.values()), weights
