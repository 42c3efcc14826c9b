"""Dictionaries of matrices and low-rank factors, in fp64.

Legend: L layers, M outputs, N inputs of a matrix, S atoms, R rank.
"""

import torch
from torch import Tensor

_FLOOR = 1e-7  # of the mean square of inputs: what channels that never fired are taken for
_RIDGE = 1e-6


def root(second_NN: Tensor) -> Tensor:
    """Return the lower Cholesky factor of a second moment of inputs, which need not be positive definite."""
    ridge = _FLOOR * second_NN.diagonal().mean().clamp_min(torch.finfo(second_NN.dtype).tiny)
    eye = torch.eye(len(second_NN), dtype=second_NN.dtype, device=second_NN.device)
    for _ in range(12):
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(second_NN + ridge * eye)
        if not int(failed):
            return factor
        ridge = ridge * 10
    raise FloatingPointError("a second moment of inputs holds NaN or inf")


def tail(weight_MN: Tensor, root_NN: Tensor) -> Tensor:
    """Return the expected square error of the output by rank 0 to min(M, N), the best of each: (K + 1,)."""
    squares = torch.linalg.svdvals(weight_MN @ root_NN).square()
    rest = squares.flip(0).cumsum(0).flip(0)
    return torch.cat([rest, torch.zeros_like(rest[:1])])


def low_rank(weight_MN: Tensor, root_NN: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return up (M, R) and down (R, N) whose product has the least expected square error of the output.

    SVD-LLM (arXiv 2403.07378, section 3.1): the singular value decomposition of W L, inputs with E[x x^T] = L L^T.
    """
    left, values, right = torch.linalg.svd(weight_MN @ root_NN, full_matrices=False)
    scale = values[:rank].sqrt()
    down = torch.linalg.solve_triangular(root_NN, right[:rank], upper=False, left=False)
    return left[:, :rank] * scale, scale[:, None] * down


def matrix_pca(weight_LMN: Tensor, atoms: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return atoms (S, M, N), coefficients (L, S) and all L eigenvalues of the Gram matrix, falling.

    Matrix PCA (MASA, arXiv 2508.04581, section 3.3), uncentred: atoms are orthonormal, and no other S atoms with one
    coefficient each leave a smaller square error, which is the sum of the eigenvalues that are left out.
    """
    flat = weight_LMN.flatten(1)
    values, vectors = torch.linalg.eigh(flat @ flat.T)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    taken = vectors[:, :atoms]
    size = values[:atoms].sqrt().clamp_min(torch.finfo(flat.dtype).tiny)
    made = (taken.T @ flat) / size[:, None]
    return made.unflatten(1, weight_LMN.shape[1:]), taken * size, values


def shared_energy(weight_LMN: Tensor, atoms: int) -> tuple[float, float]:
    """Return the share of squares that atoms capture, and what they would of orthogonal matrices with the same norms.

    Where the two are alike there is nothing that layers share: only their norms differ.
    """
    flat = weight_LMN.flatten(1)
    gram = flat @ flat.T
    values = torch.linalg.eigvalsh(gram).flip(0)
    norms = gram.diagonal().sort(descending=True).values
    total = norms.sum().clamp_min(torch.finfo(norms.dtype).tiny)
    return float(values[:atoms].sum() / total), float(norms[:atoms].sum() / total)


def objective(weight_LMN: Tensor, second_LNN: Tensor, atoms_SMN: Tensor, coefficient_LS: Tensor) -> float:
    """Return the sum over layers of E |(W - sum c D) x|^2."""
    error = weight_LMN - torch.einsum("ls,smn->lmn", coefficient_LS, atoms_SMN)
    return float(torch.einsum("lmn,lnk,lmk->", error, second_LNN, error))


def fit_coefficients(weight_LMN: Tensor, second_LNN: Tensor, atoms_SMN: Tensor) -> Tensor:
    """Return the coefficients (L, S) with the least `objective`."""
    rows = []
    for weight, second in zip(weight_LMN, second_LNN, strict=True):
        read = (atoms_SMN @ second).flatten(1)
        gram = read @ atoms_SMN.flatten(1).T
        ridge = 1e-12 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        rows.append(torch.linalg.solve(gram + ridge, read @ weight.flatten()))
    return torch.stack(rows)


def fit_atoms(weight_LMN: Tensor, second_LNN: Tensor, atoms_SMN: Tensor, coefficient_LS: Tensor) -> Tensor:
    """Return atoms with a smaller `objective`: each in turn, the others as they are.

    The ridge pulls to the present atom, so that the objective never rises.
    """
    atoms = atoms_SMN.clone()
    for s in range(len(atoms)):
        weighed = torch.einsum("l,lnk->nk", coefficient_LS[:, s].square(), second_LNN)
        error = weight_LMN - torch.einsum("ls,smn->lmn", coefficient_LS, atoms)
        missing = torch.einsum("l,lmn,lnk->mk", coefficient_LS[:, s], error, second_LNN)
        ridge = _RIDGE * weighed.diagonal().mean()
        if float(ridge) == 0:
            continue  # no layer uses the atom
        eye = torch.eye(len(weighed), dtype=weighed.dtype)
        atoms[s] += torch.linalg.solve(weighed + ridge * eye, missing, left=False)
    return atoms
