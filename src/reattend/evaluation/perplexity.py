"""evaluate(): perplexity with its error, and, against a base on the same tokens, what changed.

Standard errors are over window means, not over tokens: tokens of one window are correlated. The
difference is paired by window, with the delta method for the exponential. Log-softmax runs in fp32.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reattend.checkpoint.index import open_checkpoint
from reattend.errors import Refusal
from reattend.families import Source, source_of
from reattend.modeling.loading import Loaded, load
from reattend.progress import Progress, silent
from reattend.texts.reading import Text, read_text
from reattend.texts.windows import Windows, read_windows


def evaluate(
    model: str | os.PathLike[str],
    text: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str] | None = None,
    window: int = 2048,
    windows: int | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure `model` on a text (a file or `dataset:..`), in disjoint windows; all of them, or `windows`.

    Returns `perplexity`, `perplexity_stderr` (None for a single window), `bits_per_byte`, `tokens` (number
    predicted) and how they were measured; with `against`, measured on the same tokens, also
    `base_perplexity`, `delta` and `delta_stderr` (perplexity), `kl_mean` (nats, base || model, per
    token) and `top1_agreement` (share of tokens). Raises `Refusal` for a text on which the model was
    calibrated or chosen.
    """
    source = _check(model, window)
    if against is not None:
        _check(against, window)
    _check_dtype(dtype)
    content = read_text(text)
    for measured in (model, against):
        _check_unused(content, measured)
    subject = load(model, dtype=dtype, device=device)
    if subject.tokenizer is None:
        raise Refusal(f"{model}: has no tokenizer, and perplexity needs one")
    bos_each = "bos_every_window" in source.family.features
    cut = read_windows(content, subject.tokenizer, window=window, windows=windows, bos_each=bos_each)
    base = load(against, dtype=dtype, device=device) if against is not None else None
    if base is not None:
        _check_tokenizers(subject, base, cut)
    rows = []
    for number, ids in enumerate(cut.ids, 1):
        rows.append(_measure(subject, base, ids))
        progress("evaluating", number, len(cut.ids))
    report = {"model": str(model), "text": str(text), **_summary([r[0] for r in rows], cut, window)}
    report["dtype"] = str(subject.model.dtype).removeprefix("torch.")
    return report | (_comparison(rows) if base is not None else {})


def _check(model: str | os.PathLike[str], window: int) -> Source:
    source = source_of(open_checkpoint(model))
    if "encoder" in source.family.features:
        raise Refusal(f"{model}: {source.family.model_type} is an encoder, perplexity is not defined for it")
    limit = source.get("max_position_embeddings") or source.get("n_positions")
    if window < 2 or (limit and window > limit):
        raise Refusal(f"window: {window} tokens, {model} takes 2 to {limit}")
    return source


def _check_dtype(dtype: str) -> None:
    if dtype not in ("auto", "float32", "bfloat16", "float16", "float64"):
        raise Refusal(f"dtype: {dtype!r} is not auto, float32, bfloat16, float16 or float64")


def _check_unused(text: Text, model: str | os.PathLike[str] | None) -> None:
    """A number from the text that shaped the model flatters it."""
    record = Path(model or "", "reattend.json")
    if model is None or not record.exists():
        return
    try:
        used = dict(json.loads(record.read_text("utf-8")).get("texts", {}))
    except (ValueError, TypeError, AttributeError) as error:
        raise Refusal(f"{record}: is damaged") from error
    for purpose, digest in used.items():
        if digest == text.sha256:
            raise Refusal(f"{text.name}: was the {purpose} text of {model}; measure on another text")


def _check_tokenizers(subject: Loaded, base: Loaded, cut: Windows) -> None:
    decoded = subject.tokenizer.decode(cut.ids[0])
    if base.tokenizer is None or base.tokenizer(decoded).input_ids != subject.tokenizer(decoded).input_ids:
        raise Refusal("the two models cut the text into different tokens, so they can't be compared")


def _measure(subject: Loaded, base: Loaded | None, ids: list[int]) -> tuple[float, float, float, float]:
    """Return one window's means: own NLL, base NLL, KL (nats), top-1 agreement."""
    tokens = torch.tensor([ids])
    ours = _log_probs(subject, tokens)
    nll = _nll(ours, tokens)
    if base is None:
        return nll, 0.0, 0.0, 0.0
    theirs = _log_probs(base, tokens)
    kl = (theirs.exp() * (theirs - ours)).sum(-1).double().mean()
    agree = (theirs.argmax(-1) == ours.argmax(-1)).double().mean()
    return nll, _nll(theirs, tokens), float(kl), float(agree)


def _log_probs(loaded: Loaded, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        device = loaded.model.device
        logits = loaded.model(tokens if device.type == "meta" else tokens.to(device)).logits
    return torch.log_softmax(logits[0, :-1].float(), -1).cpu()


def _nll(log_probs: Tensor, tokens: Tensor) -> float:
    return float(-log_probs.gather(-1, tokens[0, 1:, None]).double().mean())


def _stderr(values: Tensor) -> float | None:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None


def _summary(nlls: list[float], cut: Windows, window: int) -> dict[str, Any]:
    means = torch.tensor(nlls, dtype=torch.float64)
    mean = float(means.mean())
    tokens = len(nlls) * (window - 1)
    bits = mean * tokens / math.log(2) / cut.nbytes if cut.nbytes else None
    return {
        "perplexity": math.exp(mean),
        "perplexity_stderr": _stderr(math.exp(mean) * means),
        "bits_per_byte": bits,
        "tokens": tokens,
        "window": window,
        "windows": len(nlls),
        "bos": cut.bos,
        "text_sha256": cut.text_sha256,
    }


def _comparison(rows: list[tuple[float, float, float, float]]) -> dict[str, Any]:
    ours, theirs, kl, agree = torch.tensor(rows, dtype=torch.float64).T
    after, before = float(ours.mean().exp()), float(theirs.mean().exp())
    return {
        "base_perplexity": before,
        "delta": after - before,
        "delta_stderr": _stderr(after * ours - before * theirs),
        "kl_mean": float(kl.mean()),
        "top1_agreement": float(agree.mean()),
    }
