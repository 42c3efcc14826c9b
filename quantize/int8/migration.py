"""Smoothing of one layer: the factors that calibration finds, and the weights that take them up."""

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reattend.calibration.layerwise import Hook, LayerPass
from reattend.errors import Failure
from reattend.families.rows import Feed
from reattend.families.source import Source
from reattend.quantize.int8.smoothing import best_factors, share

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_ROWS = 2048  # tokens of the selection text that the search looks at: enough to rank, bounded in memory


def layer_factors(layer: LayerPass, source: Source, quantised: Container[str]) -> dict[str, Tensor]:
    """Return the factors s_I of a layer's feeds, by the producer's name, and the alphas chosen.

    Ranges come from the calibration text, alpha from the selection text, by the error of the consumers that are
    `quantised` (names within the layer); a feed without one is left alone.
    """
    feeds = {feed: [name for name in feed.consumers if name in quantised] for feed in source.family.feeds}
    watches = {feed: _Watch() for feed, consumers in feeds.items() if consumers}
    layer.run([(feed.consumers[0], watch.hook(layer)) for feed, watch in watches.items()])
    found = {}
    for feed, watch in watches.items():
        weights = [layer.module.get_parameter(f"{name}.weight").detach() for name in feeds[feed]]
        try:
            alpha, factors = _search(weights, feed, source, watch)
        except ValueError as error:
            raise Failure(f"layer {layer.index}, input of {feed.consumers[0]}: {error}") from error
        found[feed.producer] = factors.cpu()
        found[f"{feed.producer}.alpha"] = torch.tensor([alpha])
    return found


class _Watch:
    """The range of one linear's input over the calibration text, and its rows on the selection text."""

    def __init__(self) -> None:
        self.absmax: Tensor | None = None
        self.rows: list[Tensor] = []

    def hook(self, layer: LayerPass) -> Hook:
        """Return what is called after each call of the linear."""

        def watch(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            if layer.text == "calibration":
                here = x.abs().amax(0)
                self.absmax = here if self.absmax is None else torch.maximum(self.absmax, here)
            elif sum(map(len, self.rows)) < _ROWS:
                self.rows.append(x.clone())

        return watch


def _search(weights: list[Tensor], feed: Feed, source: Source, watch: _Watch) -> tuple[float, Tensor]:
    assert watch.absmax is not None
    absmax, weight_absmax = watch.absmax, torch.stack([w.abs().amax(0) for w in weights]).amax(0)
    if absmax.numel() != producer_rows(feed, source):
        heads = int(source.get("heads"))
        absmax, weight_absmax = (share(v, heads, source.num_kv_heads) for v in (absmax, weight_absmax))
    return best_factors(torch.cat(watch.rows), weights, absmax, weight_absmax, ALPHAS)


def producer_rows(feed: Feed, source: Source) -> int:
    """Output channels of a feed's producer: fewer than the consumers' columns where KV heads are shared."""
    if feed.rows is not None:
        return source.size(feed.rows[1]) - source.size(feed.rows[0])
    linear = source.family.linears.get(feed.producer)
    return source.size(linear[0]) if linear else source.size("hidden")


def migrate(name: str, tensor: Tensor, factors: Mapping[str, Tensor], source: Source) -> Tensor:
    """Return a tensor of a layer (`name` within it, as `mlp.up_proj.weight`) with every feed's s moved; fp32.

    What a feed produces is divided by its s, the columns that consume it are multiplied.
    """
    module, _, kind = name.rpartition(".")
    moved = tensor.float()
    for feed in source.family.feeds:
        if feed.producer not in factors:
            continue
        s_I = factors[feed.producer]
        if module in feed.consumers and kind == "weight":
            moved = moved * s_I
        if module == feed.producer:
            moved = _divided(moved, feed, _per_row(s_I, feed, source), source)
    return moved


def _per_row(s_I: Tensor, feed: Feed, source: Source) -> Tensor:
    """The factor of each output channel of the producer, from those of the consumers' columns."""
    rows = producer_rows(feed, source)
    if s_I.numel() == rows:
        return s_I
    return s_I.reshape(source.num_kv_heads, -1, source.head_dim)[:, 0].reshape(rows)


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
