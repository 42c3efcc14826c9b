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
    cut = read_windows(text, tokenizer, window=window, bos_each=bos_each).ids
    if len(cut) < windows:
        raise Refusal(f"{text.name}: holds {len(cut)} windows of {window} tokens, {windows} are asked for")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(cut), generator=generator)[:windows].sort().values
    return torch.tensor(cut)[chosen]
