"""Second moments of inputs, drawn."""

import torch


def moments(count, size, scale=3.0):
    """Second moments that differ much between layers."""
    x = torch.randn(count, 4 * size, size).double() * torch.rand(count, 1, size).double().mul(scale).exp()
    return x.mT @ x / x.shape[1]
