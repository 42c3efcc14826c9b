"""Text to windows of token ids, with the bytes that each window's predictions cover."""

from dataclasses import dataclass
from typing import Any

from reattend.errors import Refusal
from reattend.texts.reading import Text


@dataclass(frozen=True)
class Windows:
    """Token ids (windows, window), bytes of text that the predicted tokens cover, and provenance."""

    ids: list[list[int]]
    nbytes: int | None
    bos: str
    text_sha256: str


def read_windows(
    text: Text,
    tokenizer: Any,
    *,
    window: int,
    windows: int | None = None,
    bos_each: bool,
) -> Windows:
    """Cut a text into disjoint windows, the incomplete tail dropped.

    Without `bos_each` the tokenizer adds what it adds, once, at the start (the GPTQ scripts' convention);
    with it every window begins with BOS. Each window's first token is not predicted.
    """
    content = text.content
    if bos_each and tokenizer.bos_token_id is None:
        raise Refusal("the tokenizer has no BOS token, with which every window of this model begins")
    encoded = tokenizer(content, add_special_tokens=not bos_each, return_offsets_mapping=tokenizer.is_fast)
    body = window - 1 if bos_each else window
    count = len(encoded.input_ids) // body
    count = count if windows is None else min(count, windows)
    if not count:
        raise Refusal(f"{text.name}: {len(encoded.input_ids)} tokens are fewer than one window of {window}")
    starts = [i * body for i in range(count)]
    lead = [tokenizer.bos_token_id] if bos_each else []
    ids = [lead + list(encoded.input_ids[s : s + body]) for s in starts]
    nbytes = None
    if tokenizer.is_fast:
        spans = encoded.offset_mapping
        ends = [(spans[s if bos_each else s + 1][0], spans[s + body - 1][1]) for s in starts]
        nbytes = sum(len(content[a:b].encode()) for a, b in ends)
    policy = "each window" if bos_each else ("start" if _adds_bos(encoded, tokenizer) else "none")
    return Windows(ids, nbytes, policy, text.sha256)


def _adds_bos(encoded: Any, tokenizer: Any) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and encoded.input_ids[0] == bos
