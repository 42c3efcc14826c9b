"""Queries of low rank: one down projection for all heads, as deepseek_v3 can hold it (`q_lora_rank`).

Truncated under two metrics: what the layer is given (the second moment of its inputs, tokens relative to their
energy) and what reads the queries (each head's second moment of keys), so that what is lost is the least mean
square error of scores.

Legend as in `attention`; O channels of the query latent.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reattend.convert.mla.attention import LatentAttention
from reattend.convert.mla.lowrank import block_diagonal, root_and_inverse


@dataclass(frozen=True)
class QueryLatent:
    """What query latents hold: directions of the input, and a constant channel where queries have biases."""

    rank: int
    bias: bool

    @property
    def width(self) -> int:
        """Channels (O)."""
        return self.rank + self.bias


def truncate_queries(layer: LatentAttention, rank: int, x_WTE: Tensor) -> LatentAttention:
    """Return the layer with queries (biases apart) that depend on `rank` directions of its input.

    `x_WTE` are inputs of the layer, by which errors are weighed. With a `rank` of E nothing is lost.
    """
    weight_FE = layer.query_HQE.flatten(0, 1).double()
    read_FF, read_inverse_FF = root_and_inverse(_key_moments(layer, x_WTE))
    given_EE, given_inverse_EE = root_and_inverse(_input_moment(x_WTE))
    left_FO, value_O, right_OE = torch.linalg.svd(read_FF @ weight_FE @ given_EE, full_matrices=False)
    kept_FE = read_inverse_FF @ (left_FO[:, :rank] * value_O[:rank]) @ right_OE[:rank] @ given_inverse_EE
    return replace(layer, query_HQE=kept_FE.to(layer.query_HQE.dtype).view_as(layer.query_HQE))


def factorise(query_FE: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return up (F, O) and down (O, E), with orthonormal rows, of a matrix whose rank is O = `rank` at most."""
    left_FO, value_O, right_OE = torch.linalg.svd(query_FE.double(), full_matrices=False)
    return left_FO[:, :rank] * value_O[:rank], right_OE[:rank]


def _input_moment(x_WTE: Tensor) -> Tensor:
    x_NE = x_WTE.flatten(0, 1).double()
    relative_NE = x_NE / x_NE.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return _full(relative_NE.T @ relative_NE / len(x_NE))


def _key_moments(layer: LatentAttention, x_WTE: Tensor) -> Tensor:
    """Second moments of every head's [position-free; rotary] keys, on the diagonal; rotary pairs count alike."""
    rank = layer.latent_rank
    down_NC = x_WTE.flatten(0, 1).double() @ layer.down_CE.double().T
    down_NC = down_NC if layer.down_bias_C is None else down_NC + layer.down_bias_C.double()
    latent_LL = down_NC[:, :rank].T @ down_NC[:, :rank] / len(down_NC)
    free_HNN = layer.key_HNL.double() @ latent_LL @ layer.key_HNL.double().mT
    # Rotation mixes the two numbers of a pair, by every angle in the long run.
    pair_P = down_NC[:, rank:].square().mean(0).view(-1, 2).mean(1)
    rope_RR = torch.diag(pair_P.repeat_interleave(2))
    return _full(block_diagonal(block_diagonal([free_NN, rope_RR]) for free_NN in free_HNN))


def _full(moment: Tensor) -> Tensor:
    """Leave no direction without weight: what a few thousand tokens do not show may come."""
    return moment + 1e-6 * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
