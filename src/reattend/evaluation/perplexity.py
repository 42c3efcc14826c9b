"""evaluate(): perplexity with its error, and, against a base on the same tokens, what changed.

Standard errors are over window means, not over tokens: tokens of one window are correlated. The
difference is paired by window, with the delta method for the exponential. Log-softmax runs in fp32.
"""

import math
import os
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from reattend.checkpoint.files import open_files
from reattend.checkpoint.index import open_checkpoint
from reattend.errors import Failure, Refusal, first_line
from reattend.evaluation.unused import check_unused
from reattend.families.source import Source, source_of
from reattend.modeling.int8 import on_kernels
from reattend.modeling.loading import check_dtype, load, load_tokenizer
from reattend.progress import Progress, silent
from reattend.texts.reading import read_text
from reattend.texts.windows import Windows, read_windows

Path: TypeAlias = str | os.PathLike[str]
_MOST_NATS = 700.0  # its exponential is near the largest double


def evaluate(
    model: Path,
    text: Path,
    *,
    against: Path | None = None,
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
    sources = [_check(path, window) for path in (model, against) if path is not None]
    if windows is not None and windows < 1:
        raise Refusal(f"windows: {windows}, expected 1 or more")
    check_dtype(dtype)
    content = read_text(text)
    for measured in (model, against):
        if measured is not None:
            check_unused(content, measured)
    folder = open_files(model).download()
    tokenizer = _tokenizer(model, folder)
    bos_each = "bos_every_window" in sources[0].family.features
    cut = read_windows(content, tokenizer, window=window, windows=windows, bos_each=bos_each)
    base_folder = None if against is None else open_files(against).download()
    if base_folder is not None:
        _check_tokenizers(tokenizer, load_tokenizer(base_folder), cut)
    # What an output does on its own hardware is to be measured, also here: so int8 attention is simulated.
    subject, base = (
        None if path is None else _Subject(str(name), load(path, dtype=dtype, device=device, simulate=True).model)
        for name, path in ((model, folder), (against, base_folder))
    )
    assert subject is not None
    rows = []
    for number, ids in enumerate(cut.ids, 1):
        rows.append(_measure(subject, base, ids))
        progress("evaluating", number, len(cut.ids))
    _check_exponential([row[:2] for row in rows], subject, base)
    report = {"model": str(model), "text": str(text), **_summary([r[0] for r in rows], cut, window)}
    report["dtype"] = str(subject.model.dtype).removeprefix("torch.")
    report["attention"] = subject.model.config._attn_implementation
    report["runtime"] = "reattend kernels" if on_kernels(subject.model) else "transformers"
    return report | (_comparison(rows) if base is not None else {})


def _check(model: Path, window: int) -> Source:
    source = source_of(open_checkpoint(model))
    if "encoder" in source.family.features:
        raise Refusal(f"{model}: {source.family.model_type} is an encoder, perplexity is not defined for it")
    limit = source.get("max_position_embeddings") or source.get("n_positions")
    if window < 2 or (isinstance(limit, int) and window > limit):
        raise Refusal(f"window: {window} tokens, {model} takes 2 {f'to {limit}' if limit else 'or more'}")
    return source


def _tokenizer(model: Path, folder: Path) -> Any:
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise Refusal(f"{model}: has no tokenizer, and perplexity needs one")
    return tokenizer


def _check_tokenizers(tokenizer: Any, other: Any, cut: Windows) -> None:
    decoded = tokenizer.decode(cut.ids[0])
    if other is None or other(decoded).input_ids != tokenizer(decoded).input_ids:
        raise Refusal("the two models cut the text into different tokens, so they can't be compared")


class _Subject(NamedTuple):
    """A model that is measured, and what to call it."""

    name: str
    model: Any

    def log_probs(self, tokens: Tensor) -> Tensor:
        """Return the log probabilities of what follows each token of one window."""
        device = self.model.device
        try:
            with torch.inference_mode():
                output = self.model(tokens if device.type == "meta" else tokens.to(device))
        except Exception as error:  # foreign code, and token ids that the model does not know
            raise Failure(f"{self.name}: can't be run: {type(error).__name__}: {first_line(error)}") from error
        logits = getattr(output, "logits", None)
        if logits is None:
            raise Failure(f"{self.name}: {type(self.model).__name__} gives no logits, and perplexity needs them")
        if not torch.isfinite(logits).all():
            raise Failure(f"{self.name}: its logits hold NaN or inf")
        return torch.log_softmax(logits[0, :-1].float(), -1).cpu()


def _measure(subject: _Subject, base: _Subject | None, ids: list[int]) -> tuple[float, float, float, float]:
    """Return one window's means: own NLL, base NLL, KL (nats), top-1 agreement."""
    tokens = torch.tensor([ids])
    ours = subject.log_probs(tokens)
    nll = _nll(ours, tokens)
    if base is None:
        return nll, 0.0, 0.0, 0.0
    theirs = base.log_probs(tokens)
    if theirs.shape != ours.shape:
        raise Failure(f"{base.name}: has {theirs.shape[-1]} tokens, {subject.name} has {ours.shape[-1]}")
    kl = (theirs.exp() * (theirs - ours)).sum(-1).double().mean()
    agree = (theirs.argmax(-1) == ours.argmax(-1)).double().mean()
    return nll, _nll(theirs, tokens), float(kl), float(agree)


def _nll(log_probs: Tensor, tokens: Tensor) -> float:
    return float(-log_probs.gather(-1, tokens[0, 1:, None]).double().mean())


def _check_exponential(nlls: list[tuple[float, float]], *subjects: _Subject | None) -> None:
    """Fail where a perplexity would be no number."""
    means = torch.tensor(nlls, dtype=torch.float64).mean(0)
    for subject, mean in zip(subjects, means.tolist(), strict=True):
        if subject is not None and not math.isfinite(mean):
            raise Failure(f"{subject.name}: the mean loss is {mean}")
        if subject is not None and mean > _MOST_NATS:
            raise Failure(f"{subject.name}: the mean loss is {mean:.5g} nats, too much for a perplexity")


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
