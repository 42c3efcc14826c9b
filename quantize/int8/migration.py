"""Smoothing of one layer: whose channels a factor divides, and the weights that take it up."""

from collections.abc import Mapping

import torch
from torch import Tensor

from reattend.families.rows import Feed
from reattend.families.source import Source


def producer_rows(feed: Feed, source: Source) -> int:
    """Output channels of a feed's producer: fewer than the consumers' columns where KV heads are shared."""
    if feed.rows is not None:
        return source.size(feed.rows[1]) - source.size(feed.rows[0])
    linear = source.family.linears.get(feed.producer)
    return source.size(linear[0]) if linear else source.size("hidden")


def owners(feed: Feed, source: Source) -> Tensor:
    """Return the producer's channel that each column of the consumers takes in, (I,) int64.

    The output projection's input repeats each value channel over the query heads of a group.
    """
    rows, columns = producer_rows(feed, source), source.size(source.family.linears[feed.consumers[0]][1])
    own = torch.arange(rows)
    if rows == columns:
        return own
    return own.reshape(source.num_kv_heads, 1, -1).expand(-1, columns // rows, -1).reshape(-1)


def migrate(name: str, tensor: Tensor, factors: Mapping[str, Tensor], source: Source) -> Tensor:
    """Return a tensor of a layer (`name` within it, as `mlp.up_proj.weight`) with every feed's s moved; fp32.

    `factors` maps `PRODUCER.factors` to s (R,). What a feed produces is divided by its s, the columns that consume
    it are multiplied.
    """
    module, _, kind = name.rpartition(".")
    moved = tensor.float()
    for feed in source.family.feeds:
        if f"{feed.producer}.factors" not in factors:
            continue
        s_R = factors[f"{feed.producer}.factors"].to(moved.device)
        if module in feed.consumers and kind == "weight":
            moved = moved * s_R[owners(feed, source).to(moved.device)]
        if module == feed.producer:
            moved = _divided(moved, feed, s_R, source)
    return moved


def input_factors(module: str, factors: Mapping[str, Tensor], source: Source) -> Tensor | None:
    """Return what the input of a linear is divided by (I,), nothing where it is left alone."""
    for feed in source.family.feeds:
        if module in feed.consumers and f"{feed.producer}.factors" in factors:
            return factors[f"{feed.producer}.factors"][owners(feed, source)]
    return None


def output_factors(module: str, outputs: int, factors: Mapping[str, Tensor], source: Source) -> Tensor | None:
    """Return what the outputs of a linear are divided by (O,), nothing where they are left alone."""
    for feed in source.family.feeds:
        if module == feed.producer and f"{feed.producer}.factors" in factors:
            return 1 / _divided(torch.ones(outputs), feed, factors[f"{feed.producer}.factors"], source)
    return None


def _divided(tensor: Tensor, feed: Feed, s_R: Tensor, source: Source) -> Tensor:
    start, stop = (source.size(symbol) for symbol in feed.rows) if feed.rows else (0, len(s_R))
    divisor = tensor.new_ones(len(tensor))
    divisor[start:stop] = s_R
    return tensor / divisor.reshape(-1, *[1] * (tensor.ndim - 1))


def layer_tensors(source: Source, prefix: str) -> list[str]:
    """Names of a layer's tensors that smoothing touches: weights and biases of producers and consumers."""
    modules = {m for feed in source.family.feeds for m in (feed.producer, *feed.consumers)}
    names = [f"{prefix}{module}.{kind}" for module in sorted(modules) for kind in ("weight", "bias")]
    produced = {feed.producer for feed in source.family.feeds}
    biases = {f"{prefix}{m}.bias" for m in modules - produced}  # a consumer's bias stays as it is
    return [name for name in names if name in source.tensors and name not in biases]
