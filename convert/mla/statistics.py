"""Second moments of queries, keys and values that the closed form needs, streamed.

Two averages over key/value tokens z = [k; v] are kept: over tokens alike, and over tokens weighted by the
attention mass that they receive. Without the second the sink token, on which most rows put most of their
mass, is one token among thousands, and its score error ruins every row. Nothing per token is stored: memory
is O((2 G D)^2) per layer.

Legend: T tokens of one sequence, H query heads, G KV heads, D head dim, Z = 2 G D (keys, then values), F = D / 2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from reattend.convert.mla.rope import Rotary, angles, rotate_halves


@dataclass(frozen=True)
class TokenMoments:
    """Uncentred second moment (Z, Z) and mean (Z,) of [k; v], fp64, per unit of weight."""

    second_ZZ: Tensor
    mean_Z: Tensor

    def mix(self, other: "TokenMoments", share: float) -> "TokenMoments":
        """Return (1 - share) x self + share x other."""
        return TokenMoments(
            torch.lerp(self.second_ZZ, other.second_ZZ, share), torch.lerp(self.mean_Z, other.mean_Z, share)
        )


@dataclass(frozen=True)
class LayerMoments:
    """What the closed form needs of one layer; all fp64, all pre-RoPE with biases (and q/k norms) applied."""

    plain: TokenMoments
    attended: TokenMoments
    query_HDD: Tensor
    distance_T: Tensor

    @property
    def kv_shape(self) -> tuple[int, int]:
        """KV heads and head dim."""
        head_dim = self.query_HDD.shape[-1]
        return self.plain.mean_Z.shape[0] // (2 * head_dim), head_dim


class MomentAccumulator:
    """Adds sequences of one layer. `max_tokens` bounds the distances that are told apart, and `window` those seen."""

    def __init__(
        self, num_heads: int, num_kv_heads: int, rotary: Rotary, max_tokens: int, scale: float,
        window: int | None = None,
    ):  # fmt: skip
        head_dim = 2 * len(rotary.frequency_F)
        width = 2 * num_kv_heads * head_dim
        self._rotary, self._scale, self._tokens = rotary, scale, 0
        self._window = window or max_tokens
        self._query = torch.zeros(num_heads, head_dim, head_dim, dtype=torch.float64)
        self._distance = torch.zeros(min(max_tokens, self._window), dtype=torch.float64)
        self._second = torch.zeros(2, width, width, dtype=torch.float64)
        self._mean = torch.zeros(2, width, dtype=torch.float64)

    def add(self, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> None:
        """Add one causal sequence from position 0: pre-RoPE projections, fp32 or wider."""
        z_TZ = torch.cat([k_TGD.flatten(1), v_TGD.flatten(1)], 1)
        mass_T = self._attend(q_THD, k_TGD)
        heads = q_THD.shape[1]
        self._tokens += len(z_TZ)
        self._query += torch.einsum("thd,the->hde", q_THD, q_THD).double()
        for slot, (left, right) in enumerate(((z_TZ, z_TZ), (z_TZ * mass_T[:, None] / heads, z_TZ))):
            self._second[slot] += (left.T @ right).double()
            self._mean[slot] += left.double().sum(0)

    def _attend(self, q_THD: Tensor, k_TGD: Tensor) -> Tensor:
        """Return each key token's mass over all heads (T,); count attention by distance."""
        tokens, heads = q_THD.shape[:2]
        positions = torch.arange(tokens)
        angle_TF = angles(self._rotary.at_length(tokens), positions)
        q_HTD = rotate_halves(q_THD.transpose(0, 1), angle_TF) * (self._scale * self._rotary.factor**2)
        k_GTD = rotate_halves(k_TGD.transpose(0, 1), angle_TF)
        lag_TT = positions[:, None] - positions[None]
        hidden_TT = (lag_TT < 0) | (lag_TT >= self._window)
        mass_T = torch.zeros(tokens, dtype=q_THD.dtype)
        for head in range(heads):
            score_TT = q_HTD[head] @ k_GTD[head // (heads // len(k_GTD))].T
            p_TT = score_TT.masked_fill(hidden_TT, -torch.inf).softmax(-1)
            mass_T += p_TT.sum(0)
            self._distance[:tokens] += sum_by_distance(p_TT)[: self._window].double()
        return mass_T

    def result(self) -> LayerMoments:
        """Return the moments per token; raises `ValueError` when nothing was added."""
        if not self._tokens:
            raise ValueError("no sequence was added")
        second, mean = self._second / self._tokens, self._mean / self._tokens
        parts = [TokenMoments((s + s.T) / 2, m) for s, m in zip(second, mean, strict=True)]
        return LayerMoments(parts[0], parts[1], self._query / self._tokens, self._distance / self._distance.sum())


def sum_by_distance(p_TT: Tensor) -> Tensor:
    """Return the sums (T,) of a square matrix over its diagonals at and below the main one, by distance."""
    tokens = len(p_TT)
    # In rows of one number less, the mirrored entries of a diagonal fall into one column.
    sheared = torch.nn.functional.pad(p_TT.flip(1), (0, tokens)).flatten()[: tokens * (2 * tokens - 1)]
    return sheared.view(tokens, 2 * tokens - 1).sum(0)[tokens - 1 :]


def mean_phase(frequency_F: Tensor, distance_T: Tensor) -> Tensor:
    """Return the mean of exp(i frequency x distance), half attention mass, half uniform pairs; (F,) complex128."""
    lag_T = torch.arange(len(distance_T), dtype=torch.float64)
    uniform_T = len(distance_T) - lag_T
    weight_T = (distance_T / distance_T.sum() + uniform_T / uniform_T.sum()) / 2
    angle_FT = frequency_F.double()[:, None] * lag_T
    return torch.complex(angle_FT.cos() @ weight_T, angle_FT.sin() @ weight_T)
