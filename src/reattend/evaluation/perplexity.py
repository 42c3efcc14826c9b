"""evaluate(): perplexity with its error, and, against a base on the same tokens, what changed.

Standard errors are over window means, not over tokens: tokens of one window are correlated. The
difference is paired by window, with the delta method for the exponential. Log-softmax runs in fp32.
"""

import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, TypeAlias

import torch

from reattend import processes
from reattend.calibration.tokens import sample_tokens
from reattend.checkpoint.files import open_files
from reattend.checkpoint.index import open_checkpoint
from reattend.errors import Failure, Refusal
from reattend.evaluation import static_perplexity as static
from reattend.evaluation.cache import cache_bytes_per_token
from reattend.evaluation.losses import nll_of, perplexity_of, stderr
from reattend.evaluation.outliers import OutlierMeter
from reattend.evaluation.subject import Subject
from reattend.evaluation.unused import check_unused
from reattend.families.source import Source, source_of
from reattend.modeling.int8 import on_kernels
from reattend.modeling.loading import check_dtype, load, load_tokenizer
from reattend.progress import Progress, silent
from reattend.texts.reading import Text, read_text
from reattend.texts.windows import Windows, read_windows

Path: TypeAlias = str | os.PathLike[str]
Row: TypeAlias = tuple[float, float, float, float]


def evaluate(  # noqa: PLR0913 (what the command takes)
    model: Path,
    text: Path,
    *,
    against: Path | None = None,
    window: int = 2048,
    windows: int | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    outliers: bool = False,
    static_calibration: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure `model` on a text (a file or `dataset:..`), in disjoint windows; all of them, or `windows`.

    Returns `perplexity`, `perplexity_stderr` (None for a single window), `bits_per_byte`, `tokens` (number
    predicted), `cache_bytes_per_token` (what the KV cache holds, in `dtype`) and how they were measured; with
    `against`, measured on the same tokens, also `base_perplexity` and `base_perplexity_stderr`, `delta` and
    `delta_stderr` (perplexity, paired), `kl_mean` (nats, base || model, per token), `top1_agreement` (share of
    tokens) and `base_cache_bytes_per_token`. With `outliers` also `outliers` and, of `against`,
    `base_outliers`: see docs/outliers.md; an encoder has these alone. `static_calibration`, another text, adds
    to them the perplexity in static W8A8, simulated. Raises `Refusal` for a text on which the model was
    calibrated or chosen, and for a calibration text that shares text with the measured one.
    """
    named = [path for path in (model, against) if path is not None]
    sources = [check_measurable(path, window=window, dtype=dtype, outliers=outliers) for path in named]
    if windows is not None and windows < 1:
        raise Refusal(f"windows: {windows}, expected 1 or more")
    _check_processes(device, outliers)
    content = read_text(text)
    for measured in named:
        check_unused(content, measured)
    calibration = _calibration(static_calibration, content, outliers, named, sources)
    folders = [open_files(path).download() for path in named]
    tokenizer = _tokenizer(model, folders[0])
    bos_each = "bos_every_window" in sources[0].family.features
    cut = read_windows(content, tokenizer, window=window, windows=windows, bos_each=bos_each)
    drawn = None
    if calibration is not None:
        count = static.CALIBRATION_WINDOWS
        drawn = sample_tokens(calibration, tokenizer, windows=count, window=window, bos_each=bos_each)
    if against is not None:
        _check_tokenizers(tokenizer, load_tokenizer(folders[1]), cut)
    processes.join(device)
    # What an output does on its own hardware is to be measured, also here: so int8 attention is simulated.
    own = processes.own_device(device)
    models = [load(folder, dtype=dtype, device=own, simulate=True).model for folder in folders]
    subjects = [Subject(str(p), m, s.family) for p, m, s in zip(named, models, sources, strict=True)]
    rows, meters = _measured(subjects, cut, outliers, progress)
    report = {"model": str(model), "text": str(text), **_summary(subjects, rows, cut, window)}
    report |= _caches(subjects, cut)
    report["dtype"] = str(subjects[0].model.dtype).removeprefix("torch.")
    report["attention"] = subjects[0].model.config._attn_implementation
    report["runtime"] = "reattend kernels" if on_kernels(subjects[0].model) else "transformers"
    if rows and against is not None:
        report |= _comparison(rows, subjects[1])
    for key, subject, meter in zip(("outliers", "base_outliers"), subjects, meters, strict=False):
        report[key] = meter.report()
        if drawn is not None:
            report[key] |= static.static_perplexity(subject, drawn, torch.tensor(cut.ids), progress)
    return report if calibration is None else report | static.record(calibration)


def _check_processes(device: str, outliers: bool) -> None:
    processes.check_device(device)
    if outliers and processes.count() > 1:
        raise Refusal("outliers: are measured by a single process; run it without torchrun")


def check_measurable(model: Path, *, window: int, dtype: str, outliers: bool) -> Source:
    """Return a model as its headers describe it. Raises `Refusal` where it could not be measured in this way."""
    check_dtype(dtype)
    source = source_of(open_checkpoint(model))
    if "encoder" in source.family.features and not outliers:
        kind = source.family.model_type
        raise Refusal(f"{model}: {kind} is an encoder, perplexity is not defined for it; outliers can be measured")
    if outliers and source.family.not_by_itself:
        raise Refusal(f"outliers: the model's {source.family.not_by_itself}, where they can't be measured")
    limit = source.get("max_position_embeddings") or source.get("n_positions")
    if window < 2 or (isinstance(limit, int) and window > limit):
        raise Refusal(f"window: {window} tokens, {model} takes 2 {f'to {limit}' if limit else 'or more'}")
    return source


def _calibration(
    text: Path | None, measured: Text, outliers: bool, models: Sequence[Path], sources: Sequence[Source]
) -> Text | None:
    """Read the text that static ranges come from, once it is clear that they can be used."""
    if text is None:
        return None
    if not outliers:
        raise Refusal("static_calibration: is for outlier metrics alone; ask for outliers too")
    for model, source in zip(models, sources, strict=True):
        static.check_simulated(model, source)
    return static.read_calibration(text, measured)


def _tokenizer(model: Path, folder: Path) -> Any:
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise Refusal(f"{model}: has no tokenizer, and measuring on a text needs one")
    return tokenizer


def _check_tokenizers(tokenizer: Any, other: Any, cut: Windows) -> None:
    decoded = tokenizer.decode(cut.ids[0])
    if other is None or other(decoded).input_ids != tokenizer(decoded).input_ids:
        raise Refusal("the two models cut the text into different tokens, so they can't be compared")


def _measured(
    subjects: Sequence[Subject], cut: Windows, outliers: bool, progress: Progress
) -> tuple[list[Row], list[OutlierMeter]]:
    """Run all windows; return their means, none where a model does not predict, and what was seen of outliers."""
    meters = [OutlierMeter(subject.model, subject.family) for subject in subjects if outliers]
    rows: list[Row | None] = []
    first, many = processes.rank(), processes.count()
    with ExitStack() as stack:
        for meter in meters:
            stack.enter_context(meter.watching())
        for number in range(first, len(cut.ids), many):
            rows.append(_measure(subjects, cut.ids[number]))
            progress("evaluating", min(number + many, len(cut.ids)), len(cut.ids))
    parts = processes.gather(rows)
    dealt = (parts[number % many][number // many] for number in range(len(cut.ids)))
    return [row for row in dealt if row is not None], meters


def _measure(subjects: Sequence[Subject], ids: list[int]) -> Row | None:
    """Return one window's means: own NLL, base NLL, KL (nats), top-1 agreement; None where a model has none."""
    tokens = torch.tensor([ids])
    if not all(subject.predicts for subject in subjects):
        for subject in subjects:
            subject.run(tokens)
        return None
    ours, *others = [subject.log_probs(tokens) for subject in subjects]
    nll = nll_of(ours, tokens)
    if not others:
        return nll, 0.0, 0.0, 0.0
    (theirs,) = others
    if theirs.shape != ours.shape:
        sizes = f"has {theirs.shape[-1]} tokens, {subjects[0].name} has {ours.shape[-1]}"
        raise Failure(f"{subjects[1].name}: {sizes}")
    kl = (theirs.exp() * (theirs - ours)).sum(-1).double().mean()
    agree = (theirs.argmax(-1) == ours.argmax(-1)).double().mean()
    return nll, nll_of(theirs, tokens), float(kl), float(agree)


def _summary(subjects: Sequence[Subject], rows: list[Row], cut: Windows, window: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if rows:
        nlls = [row[0] for row in rows]
        value, error = perplexity_of(subjects[0].name, nlls)
        tokens = len(nlls) * (window - 1)
        bits = sum(nlls) / len(nlls) * tokens / math.log(2) / cut.nbytes if cut.nbytes else None
        found = {"perplexity": value, "perplexity_stderr": error, "bits_per_byte": bits, "tokens": tokens}
    return found | {"window": window, "windows": len(cut.ids), "bos": cut.bos, "text_sha256": cut.text_sha256}


def _caches(subjects: Sequence[Subject], cut: Windows) -> dict[str, Any]:
    keys = ("cache_bytes_per_token", "base_cache_bytes_per_token")
    return {key: cache_bytes_per_token(subject, cut.ids[0]) for key, subject in zip(keys, subjects, strict=False)}


def _comparison(rows: list[Row], base: Subject) -> dict[str, Any]:
    ours, theirs, kl, agree = torch.tensor(rows, dtype=torch.float64).T
    after = float(ours.mean().exp())
    before, error = perplexity_of(base.name, theirs.tolist())
    return {
        "base_perplexity": before,
        "base_perplexity_stderr": error,
        "delta": after - before,
        "delta_stderr": stderr(after * ours - before * theirs),
        "kl_mean": float(kl.mean()),
        "top1_agreement": float(agree.mean()),
    }
