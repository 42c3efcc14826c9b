"""The perplexity of a model in static W8A8, its ranges from a text that is not the measured one."""

import os
from typing import Any

from torch import Tensor

from reattend.errors import Refusal
from reattend.evaluation.losses import nll_of, perplexity_of
from reattend.evaluation.subject import Subject
from reattend.evaluation.w8a8_simulation import static_w8a8
from reattend.families.source import Source
from reattend.progress import Progress
from reattend.texts.reading import Text, check_separate, read_text

CALIBRATION_WINDOWS = 16


def check_simulated(model: str | os.PathLike[str], source: Source) -> None:
    """Refuse a model that the simulation does not cover."""
    reason = None
    if "encoder" in source.family.features:
        reason = "is an encoder, and perplexity is not defined for it"
    elif "experts" in source.family.features:
        reason = "has experts, whose weights are in no linear layer"
    elif source.config.get("quantization_config"):
        reason = "is quantised already, and the simulation rounds weights in full precision"
    if reason:
        raise Refusal(f"{model}: no static W8A8 perplexity: {source.family.model_type} {reason}")


def read_calibration(text: str | os.PathLike[str], measured: Text) -> Text:
    """Read the text that ranges come from. Raises `Refusal` where it shares text with the measured one."""
    calibration = read_text(text)
    check_separate({"measured": measured, "static calibration": calibration})
    return calibration


def static_perplexity(
    subject: Subject, calibration_WT: Tensor, windows_WT: Tensor, progress: Progress
) -> dict[str, float | None]:
    """Return `static_w8a8_perplexity` of token windows, and its standard error; ranges come from other windows."""
    name, nlls = f"{subject.name} in static W8A8", []
    simulated = subject._replace(name=name)
    with static_w8a8(subject.model, subject.family) as simulation:
        for number, ids in enumerate(calibration_WT, 1):
            simulated.run(ids[None])
            progress("calibrating static W8A8", number, len(calibration_WT))
        simulation.freeze()
        for number, ids in enumerate(windows_WT, 1):
            nlls.append(nll_of(simulated.log_probs(ids[None]), ids[None]))
            progress("evaluating static W8A8", number, len(windows_WT))
    value, error = perplexity_of(name, nlls)
    return {"static_w8a8_perplexity": value, "static_w8a8_perplexity_stderr": error}


def record(calibration: Text) -> dict[str, Any]:
    """Return what a report says of the text that ranges come from."""
    return {
        "static_calibration": calibration.name,
        "static_calibration_sha256": calibration.sha256,
        "static_calibration_windows": CALIBRATION_WINDOWS,
    }
