"""Joint low rank of position-free keys and values.

One latent c = E_k^T A k + E_v^T N v holds both. With A = M^1/2, where M is the second moment of the queries as
they read keys, |A dk|^2 is the mean square score error; with N = (W_o^T W_o)^1/2, |N dv|^2 is the square error
of the output. E are the leading eigenvectors of the moment of [A k; N v] after both traces are made equal.
Published form (TransMLA, arXiv 2502.07864, section 4.2): A and N are multiples of the identity.

Legend: G KV heads, H query heads, D head dim, L latent, E hidden, K = G D, Z = 2 K.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from reattend.convert.mla.statistics import TokenMoments

_SMALLEST = 1e-9


@dataclass(frozen=True)
class Metric:
    """Square roots (K, K) of what weighs errors of keys and of values, and their pseudo-inverses; fp64."""

    key_KK: Tensor
    key_inverse_KK: Tensor
    value_KK: Tensor
    value_inverse_KK: Tensor


@dataclass(frozen=True)
class LowRank:
    """c = down_LZ [k; v]; [k; v] is read back as up_ZL c + shift_Z. All fp64."""

    down_LZ: Tensor
    up_ZL: Tensor
    shift_Z: Tensor


def root_and_inverse(moment_KK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the symmetric root of a PSD matrix and its pseudo-inverse (null directions stay null)."""
    value, vector = torch.linalg.eigh((moment_KK + moment_KK.T) / 2)
    alive = value > float(value.max()) * _SMALLEST
    root = value.clamp(min=0).sqrt() * alive
    inverse = torch.where(alive, 1 / root.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    return vector * root @ vector.T, vector * inverse @ vector.T


def block_diagonal(blocks: Iterable[Tensor]) -> Tensor:
    """Put square matrices on the diagonal of one."""
    parts = list(blocks)
    out = parts[0].new_zeros(*(sum(len(p) for p in parts) for _ in range(2)))
    start = 0
    for part in parts:
        out[start : start + len(part), start : start + len(part)] = part
        start += len(part)
    return out


def output_metric(free_HDK: Tensor, query_HDD: Tensor, output_EHD: Tensor, num_kv_heads: int) -> Metric:
    """Weigh keys by the queries' moments and values by o_proj.

    `free_HDK` is the position-free bilinear form: the score is q_h . (free_HDK[h] k), before the scale.
    """
    read_KK = torch.einsum("hdk,hde,hel->kl", free_HDK, query_HDD, free_HDK)
    gram_HDD = torch.einsum("ehd,ehf->hdf", output_EHD.double(), output_EHD.double())
    gram_GDD = gram_HDD.view(num_kv_heads, -1, *gram_HDD.shape[1:]).sum(1)
    return Metric(*root_and_inverse(read_KK), *root_and_inverse(block_diagonal(gram_GDD)))


def flat_metric(moments: TokenMoments, kept_KK: Tensor) -> Metric:
    """Weigh keys and values alike, up to one balance of norms, as published.

    `kept_KK` projects keys on their position-free part; the balance is of mean root mean squares.
    """
    width = len(kept_KK)
    key = kept_KK @ moments.second_ZZ[:width, :width] @ kept_KK.T
    live = key.diagonal() > float(key.diagonal().max()) * _SMALLEST
    ratio = key.diagonal()[live].sqrt().mean() / moments.second_ZZ.diagonal()[width:].sqrt().mean()
    eye = torch.eye(width, dtype=torch.float64)
    return Metric(kept_KK / ratio, kept_KK.T * ratio, eye, eye)


def joint_low_rank(
    moments: TokenMoments, metric: Metric, rank: int, *, centred: bool = True, value_weight: float | None = 1.0
) -> LowRank:
    """Truncate [k; v] to `rank` numbers under `metric`.

    `centred` needs a place for the values' mean (a bias of o_proj); that of keys shifts all scores of a row
    alike. `value_weight` is the ratio of the traces of values and keys; None leaves the metric as it is.
    """
    second_ZZ, mean_Z = moments.second_ZZ, moments.mean_Z * (1.0 if centred else 0.0)
    second_ZZ = second_ZZ - mean_Z[:, None] * mean_Z
    width = len(metric.key_KK)
    ratio = _trace_ratio(second_ZZ, metric, width) * value_weight if value_weight is not None else 1.0
    root_ZZ = block_diagonal([metric.key_KK, metric.value_KK * ratio**0.5])
    inverse_ZZ = block_diagonal([metric.key_inverse_KK, metric.value_inverse_KK / ratio**0.5])
    weighed = root_ZZ @ second_ZZ @ root_ZZ.T
    _, vector = torch.linalg.eigh((weighed + weighed.T) / 2)
    leading_ZL = vector[:, -rank:].flip(1)
    down_LZ, up_ZL = leading_ZL.T @ root_ZZ, inverse_ZZ @ leading_ZL
    return LowRank(down_LZ, up_ZL, mean_Z - up_ZL @ (down_LZ @ mean_Z))


def _trace_ratio(second_ZZ: Tensor, metric: Metric, width: int) -> float:
    key = torch.trace(metric.key_KK @ second_ZZ[:width, :width] @ metric.key_KK.T)
    value = torch.trace(metric.value_KK @ second_ZZ[width:, width:] @ metric.value_KK.T)
    return float(key / value) if key > 0 and value > 0 else 1.0
