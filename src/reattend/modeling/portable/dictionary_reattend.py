"""Projections from low-rank factors and from what layers share. Copied into checkpoints: needs transformers only.

What layers share has one owner, `ReattendDictionary` in the base model: atoms (MASA, arXiv 2508.04581) or a basis
(arXiv 2410.03765). Each projection holds its own factors and coefficients, and asks the owner when it runs.

Legend: S atoms, M outputs, N inputs of a projection, R rank.
"""

import bisect

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init


class ReattendDictionary(nn.Module):
    """The parameters that layers share, by projection and block: atoms (S, M, N), or a basis (R, N)."""

    def __init__(self, config):
        super().__init__()
        for layer in config.weight_dictionary["blocks"]:
            for name, (outputs, inputs) in shapes(config).items():
                atoms, rank = atoms_of(config, name, layer), config.weight_dictionary["ranks"][name][layer]
                if shares_basis(config, name) and rank is not None:
                    self.register_parameter(f"{name}_{layer}", nn.Parameter(torch.empty(rank, inputs)))
                elif atoms:
                    self.register_parameter(f"{name}_{layer}", nn.Parameter(torch.empty(atoms, outputs, inputs)))

    def forward(self, name):
        """Return a parameter."""
        return self.get_parameter(name)


class ReattendFactored(nn.Module):
    """y = up (down x) + sum_s c_s D_s x + bias."""

    def __init__(self, config, name, layer_idx, bank, bias):
        super().__init__()
        outputs, inputs = shapes(config)[name]
        rank, atoms = config.weight_dictionary["ranks"][name][layer_idx], atoms_of(config, name, layer_idx)
        self.key = f"{name}_{block_of(config, layer_idx)}"
        self.down = None if shares_basis(config, name) else nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=bias)
        self.coefficients = nn.Parameter(torch.empty(atoms)) if atoms else None
        self._bank = [bank]  # in a list, so that it is no child: its parameters are stored once, with their owner

    def forward(self, x):
        """Return the projection of `x` (..., N); the weights of atoms are added up anew in each call."""
        y = self.up(F.linear(x, self._bank[0](self.key)) if self.down is None else self.down(x))
        return y if self.coefficients is None else y + F.linear(x, self._from_atoms())

    def _from_atoms(self):
        return torch.einsum("s,smn->mn", self.coefficients, self._bank[0](self.key))

    def dense(self) -> nn.Linear:
        """Return a linear layer with the same weight (M, N), added up in fp32 at least, and bias."""
        wide = torch.promote_types(self.up.weight.dtype, torch.float32)
        down = self._bank[0](self.key) if self.down is None else self.down.weight
        weight = self.up.weight.to(wide) @ down.to(wide)
        if self.coefficients is not None:
            weight += torch.einsum("s,smn->mn", self.coefficients.to(wide), self._bank[0](self.key).to(wide))
        outputs, inputs = weight.shape
        made = nn.Linear(inputs, outputs, bias=self.up.bias is not None, device="meta")
        made.weight = nn.Parameter(weight.detach().to(self.up.weight.dtype))
        if self.up.bias is not None:
            made.bias = self.up.bias
        return made


def projection(config, name, layer_idx, bank, bias):
    """Return a projection: factored where the config says so, else a linear layer."""
    outputs, inputs = shapes(config)[name]
    whole = config.weight_dictionary is None or config.weight_dictionary["ranks"][name][layer_idx] is None
    if whole:
        return nn.Linear(inputs, outputs, bias=bias)
    return ReattendFactored(config, name, layer_idx, bank, bias)


def shapes(config):
    """Return the (M, N) of each projection."""
    hidden = config.hidden_size
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    return {
        "q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden), "o_proj": (hidden, queries)
    }  # fmt: skip


def block_of(config, layer_idx):
    """Return the first layer of the block that a layer is in."""
    blocks = config.weight_dictionary["blocks"]
    return blocks[bisect.bisect(blocks, layer_idx) - 1]


def atoms_of(config, name, layer_idx):
    """Return how many atoms a layer's block has for a projection."""
    blocks = config.weight_dictionary["blocks"]
    return config.weight_dictionary["atoms"][name][bisect.bisect(blocks, layer_idx) - 1]


def shares_basis(config, name):
    """Whether a block's layers share the second factor of a projection: those of one input."""
    return config.weight_dictionary["solver"] == "basis" and name != "o_proj"


def init_dictionary_parts(module, std):
    """To be called by `_init_weights` of a model for each of its modules."""
    if isinstance(module, (ReattendDictionary, ReattendFactored)):
        for parameter in module.parameters(recurse=False):
            init.normal_(parameter, mean=0.0, std=std)
