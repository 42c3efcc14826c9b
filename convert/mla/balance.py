"""Scales that leave a layer's function alone, chosen so that what writes a channel and what reads it are alike.

Steps of a fit have one size for all of a matrix's numbers, and the closed form's channels span orders of magnitude.
Legend as in `attention`.
"""

from dataclasses import replace

import torch
from torch import Tensor

from reattend.convert.mla.attention import LatentAttention


def balance(layer: LatentAttention) -> LatentAttention:
    """Give each latent channel, and each pair of rotary numbers, one root mean square where written and read."""
    rank, free = layer.latent_rank, layer.key_HNL.shape[1]
    down_CE, query_HQE = layer.down_CE.double(), layer.query_HQE.double()
    read_L = torch.cat([layer.key_HNL, layer.value_HVL], 1).double().square().mean((0, 1))
    latent_L = _factor(down_CE[:rank].square().mean(1), read_L)
    write_R, query_R = _by_pair(down_CE[rank:].square().mean(1)), _by_pair(query_HQE[:, free:].square().mean((0, 2)))
    rope_R = _factor(write_R, query_R)
    factor_C = torch.cat([latent_L, rope_R])
    factor_Q = torch.cat([torch.ones(free, dtype=torch.float64), rope_R])
    balanced = replace(
        layer,
        down_CE=down_CE * factor_C[:, None],
        down_bias_C=None if layer.down_bias_C is None else layer.down_bias_C * factor_C,
        query_HQE=query_HQE / factor_Q[:, None],
        query_bias_HQ=None if layer.query_bias_HQ is None else layer.query_bias_HQ / factor_Q,
        key_HNL=layer.key_HNL / latent_L,
        value_HVL=layer.value_HVL / latent_L,
    )
    return balanced.to(layer.down_CE.dtype)


def _factor(write_square: Tensor, read_square: Tensor) -> Tensor:
    used = (write_square > 0) & (read_square > 0)  # a pruned projection leaves zeros, which no factor balances
    factor = (read_square / torch.where(used, write_square, 1.0)).pow(0.25)
    return torch.where(used, factor, torch.ones_like(factor))


def _by_pair(square_R: Tensor) -> Tensor:
    """A rotation mixes the two numbers of a pair, so they share a scale."""
    return square_R.view(-1, 2).mean(1).repeat_interleave(2)
