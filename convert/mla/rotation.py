"""Rotation of RoPE pairs across KV heads, and the pairs that keep RoPE.

A pair (x_f, x_{F+f}) of a head is the complex number x_f + i x_{F+f}; RoPE multiplies it by a phase. A map
across KV heads that mixes pairs of one frequency only commutes with it, so it is exact (RoRoPE, TransMLA,
arXiv 2502.07864, section 4.1; there real and orthogonal, `hermitian=False, weighted=False`). Here it may be
complex, and weighted by the energy of the queries that read each head: eigenvectors of W^1/2 S W^1/2 order
components by their share of the scores' variance.

Legend: G KV heads, H query heads, D head dim, F = D / 2 frequencies, N = G F components, R rotary rows
(real and imaginary part interleaved).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Components:
    """Complex maps to N components: z' = key_NGF . z and q'_h = query_NGF[:, g(h)] . q_h; complex128.

    Re(sum over n of conj(q') z') is the unrotated score. `energy_N` is a component's mean square share of the
    scores, summed over heads; `frequency_N` indexes the frequency at which it would rotate.
    """

    key_NGF: Tensor
    query_NGF: Tensor
    energy_N: Tensor
    frequency_N: Tensor


def rotate_heads(
    key_second_ZZ: Tensor, query_HDD: Tensor, *, hermitian: bool = True, weighted: bool = True
) -> Components:
    """Rotate each frequency's pairs across KV heads. `key_second_ZZ` (G D, G D) and `query_HDD` are fp64."""
    half = query_HDD.shape[-1] // 2
    kv = len(key_second_ZZ) // (2 * half)
    second_FGG = complex_second(key_second_ZZ, half)
    second_FGG = second_FGG if hermitian else torch.complex(second_FGG.real, torch.zeros_like(second_FGG.real))
    weight_FG = query_energy(query_HDD, kv) if weighted else torch.ones(half, kv, dtype=torch.float64)
    weight_FG = weight_FG if bool((weight_FG > 0).any()) else torch.ones_like(weight_FG)  # queries may be pruned
    root_FG = weight_FG.clamp(min=float(weight_FG.max()) * 1e-12).sqrt()
    value_FC, vector_FGC = torch.linalg.eigh(root_FG[:, :, None] * second_FGG * root_FG[:, None])
    key_FCG = vector_FGC.flip(-1).mH * root_FG[:, None]
    query_FCG = vector_FGC.flip(-1).mH / root_FG[:, None]
    frequency_N = torch.arange(half).repeat_interleave(kv)
    return Components(_spread(key_FCG), _spread(query_FCG), value_FC.flip(-1).clamp(min=0).flatten(), frequency_N)


def _spread(map_FCG: Tensor) -> Tensor:
    """Write per-frequency maps (F, C, G) as maps over all pairs (F C, G, F)."""
    half, _, kv = map_FCG.shape
    out = torch.zeros(half, kv, kv, half, dtype=map_FCG.dtype)
    index = torch.arange(half)
    out[index, :, :, index] = map_FCG
    return out.flatten(0, 1)


def complex_second(second_ZZ: Tensor, half: int) -> Tensor:
    """Return E[z z^H] across KV heads for each frequency (F, G, G), from the real moment (G D, G D)."""
    kv = len(second_ZZ) // (2 * half)
    blocks = second_ZZ.view(kv, 2, half, kv, 2, half).diagonal(dim1=2, dim2=5)
    xx, xy, yx, yy = (blocks[:, i, :, j].movedim(-1, 0) for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)))
    return torch.complex(xx + yy, yx - xy)


def query_energy(query_HDD: Tensor, num_kv_heads: int) -> Tensor:
    """Return E|q_f|^2 summed over the query heads of each KV head, (F, G)."""
    square_HD = query_HDD.diagonal(dim1=1, dim2=2)
    half = square_HD.shape[1] // 2
    return (square_HD[:, :half] + square_HD[:, half:]).view(num_kv_heads, -1, half).sum(1).T


def fold_frequencies(key_second_ZZ: Tensor, head_dim: int, fold: int, stride: int) -> Components:
    """RoRoPE with FreqFold as published: real PCA over KV heads and `fold` neighbouring frequencies at once.

    Component m of a band rotates at the band's frequency m x `stride` while there is one, which is exact only
    for fold = stride = 1. `fold` divides head_dim / 2, `stride` divides `fold`.
    """
    half = head_dim // 2
    kv = len(key_second_ZZ) // head_dim
    if half % fold or fold % stride:
        raise ValueError(f"fold {fold} must divide {half}, and stride {stride} must divide fold")
    moment = key_second_ZZ.view(kv, 2, half, kv, 2, half)
    both = moment[:, 0, :, :, 0] + moment[:, 1, :, :, 1]
    maps, energies, frequencies = [], [], []
    for start in range(0, half, fold):
        band = slice(start, start + fold)
        value, vector = torch.linalg.eigh(both[:, band][..., band].reshape(kv * fold, kv * fold))
        full = torch.zeros(kv * fold, kv, half, dtype=torch.float64)
        full[:, :, band] = vector.flip(-1).T.view(-1, kv, fold)
        maps.append(full)
        energies.append(value.flip(-1).clamp(min=0))
        frequencies.append(start + torch.arange(kv * fold).clamp(max=fold // stride - 1) * stride)
    key_NGF = torch.cat(maps).to(torch.complex128)
    return Components(key_NGF, key_NGF, torch.cat(energies), torch.cat(frequencies))


def key_rows(components: Components, kept_P: Tensor) -> Tensor:
    """Return real rows (R, G, D) whose products with k are the kept components, interleaved re, im."""
    return _real_rows(components.key_NGF[kept_P]).flatten(0, 1)


def query_rows(components: Components, kept_P: Tensor, num_heads: int) -> Tensor:
    """Return real rows (H, R, D) whose products with q_h are the kept components, interleaved re, im."""
    rows_PSGD = _real_rows(components.query_NGF[kept_P])
    kv = rows_PSGD.shape[2]
    rows_GRD = rows_PSGD.flatten(0, 1).transpose(0, 1)
    return rows_GRD.repeat_interleave(num_heads // kv, 0)


def _real_rows(map_PGF: Tensor) -> Tensor:
    """Write complex maps (P, G, F) on x + i y as real ones (P, 2, G, D) on [x; y]."""
    real = torch.cat([map_PGF.real, -map_PGF.imag], -1)
    imaginary = torch.cat([map_PGF.imag, map_PGF.real], -1)
    return torch.stack([real, imaginary], 1)
