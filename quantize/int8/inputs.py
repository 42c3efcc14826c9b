"""The inputs of a layer's linears as a calibration pass sees them: ranges, sampled rows and second moments.

Legend: N tokens of a window, I input channels.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from reattend.calibration.layerwise import LayerPass
from reattend.quantize.int8.formulas import token_weights

_FIT_ROWS, _CHOICE_ROWS = 4096, 2048  # tokens that the searches look at: enough to rank, bounded in memory
_LEAST_ROWS = 64  # of a window that gives any
# What a window's first token counts for in smoothing: attention rests on it, and its errors reach every later token.
# Of 1 and 8 the one with the lower KL on the selection text of SmolLM2-135M (docs/experiments.md).
_FIRST_TOKEN = 8.0


class Inputs:
    """The inputs of a layer's linears: those called one after the other with the very same tensor share one."""

    def __init__(self, layer: LayerPass, *, moment: bool) -> None:
        self._layer, self._moment = layer, moment
        self._names = {id(module): name for name, module in layer.module.named_modules()}
        self._shared: dict[str, SharedInput] = {}  # by the linear that was called first
        self._last: tuple[Tensor | None, str] = (None, "")

    def hook(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        """Take in one window's input of one linear."""
        name, x = self._names[id(module)], inputs[0]
        if x is self._last[0]:
            shared = self._shared[self._last[1]]
            shared.linears += (name,) if name not in shared.linears else ()
            return
        self._last = (x, name)
        shared = self._shared.setdefault(name, SharedInput(self._layer, name, self._moment))
        shared.take(x.reshape(-1, x.shape[-1]))

    def __iter__(self) -> Iterator["SharedInput"]:
        return iter(self._shared.values())

    def of(self, linears: Iterable[str]) -> "SharedInput | None":
        """The input of the first of `linears` that was called."""
        return next((shared for shared in self if set(linears) & set(shared.linears)), None)


class SharedInput:
    """One input: its channels' range, sampled rows of both texts and, where wanted, its second moment."""

    def __init__(self, layer: LayerPass, linear: str, moment: bool) -> None:
        self.linears: tuple[str, ...] = (linear,)
        self._layer, self._moment = layer, moment
        self.absmax: Tensor | None = None
        self.second: Tensor | None = None
        self._rows: dict[str, list[Tensor]] = {text: [] for text in layer.hidden}
        self._emphasis: dict[str, list[Tensor]] = {text: [] for text in layer.hidden}
        self._seen = dict.fromkeys(layer.hidden, 0)

    def take(self, x_NI: Tensor) -> None:
        """Take in one window of the text that runs."""
        text = self._layer.text
        if text == "calibration":
            here = x_NI.abs().amax(0)
            self.absmax = here if self.absmax is None else torch.maximum(self.absmax, here)
            if self._moment:
                self._add(x_NI.float())
        most = _FIT_ROWS if text == "calibration" else _CHOICE_ROWS
        rows = sampled(self._seen[text], len(self._layer.hidden[text]), len(x_NI), most)
        self._rows[text].append(x_NI[rows.to(x_NI.device)])
        self._emphasis[text].append(torch.where(rows == 0, _FIRST_TOKEN, 1.0))
        self._seen[text] += 1

    def _add(self, x_NI: Tensor) -> None:
        """Add a window's second moment, its tokens relative to their energy: huge ones count as one each."""
        relative = x_NI * token_weights(x_NI).sqrt()[:, None]
        here = (relative.T @ relative).double()
        self.second = here if self.second is None else self.second.add_(here)

    def emphasis(self, text: str) -> Tensor:
        """What each of the rows sampled from a text counts for (N,)."""
        assert self.absmax is not None
        return torch.cat(self._emphasis[text]).to(self.absmax.device)

    def finite_rows(self, text: str) -> Tensor:
        """The rows sampled from a text. Raises `BadNumbersError` for NaN and inf, naming a linear that takes them."""
        rows = torch.cat(self._rows[text])
        if not bool(torch.isfinite(rows).all()):
            raise self._layer.bad_numbers(f"input of {self.linears[0]}")
        return rows


def sampled(window: int, windows: int, tokens: int, most: int) -> Tensor:
    """Return the rows of one of `windows` windows of `tokens` that are looked at: about `most` of all of them.

    The starts of equal parts, so always a window's first token: attention rests on it, and its errors reach every
    later token. Left out, the KL of SmolLM2-135M after smoothing is a fifth higher on the selection text. Of many
    windows every n-th gives rows, as one in 64 of them is a first token at most.
    """
    each = min(tokens, max(_LEAST_ROWS, most // windows))
    stride = -(-windows * each // most)
    if window % stride:
        return torch.empty(0, dtype=torch.int64)
    return torch.arange(each) * tokens // each
