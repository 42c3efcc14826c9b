"""The token windows that calibration runs on."""

from typing import Any

import torch
from torch import Tensor

from reattend.errors import Refusal
from reattend.texts.reading import Text
from reattend.texts.windows import read_windows


def sample_tokens(
    text: Text, tokenizer: Any, *, windows: int, window: int, seed: int = 0, bos_each: bool = False
) -> Tensor:
    """Draw `windows` disjoint windows of `window` tokens from a text, in the text's order.

    Returns ids (windows, window), int64; the same seed draws the same windows. Raises `Refusal` where the
    text is too short for that many.
    """
    return draw(cut_tokens(text, tokenizer, window=window, bos_each=bos_each), windows, seed, text.name)


def cut_tokens(text: Text, tokenizer: Any, *, window: int, bos_each: bool = False) -> Tensor:
    """Cut a text into all of its windows (windows, window), int64. Raises `Refusal` for a text that has none."""
    return torch.tensor(read_windows(text, tokenizer, window=window, bos_each=bos_each).ids)


def draw(cut: Tensor, windows: int, seed: int, name: str) -> Tensor:
    """Draw `windows` of a text's windows, in its order. Raises `Refusal` where there are fewer, with its `name`."""
    if len(cut) < windows:
        raise Refusal(f"{name}: holds {len(cut)} windows of {cut.shape[1]} tokens, {windows} are asked for")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(cut), generator=generator)[:windows].sort().values
    return cut[chosen]
