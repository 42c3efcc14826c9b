"""Run a step's calibration and keep its statistics on disk, so that an interrupted run does it once."""

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from reattend import processes
from reattend.calibration.layerwise import LayerPass, layer_passes, logits_of, window_losses
from reattend.calibration.tokens import cut_tokens, draw
from reattend.checkpoint.index import MANIFEST, Checkpoint, open_checkpoint, read_json
from reattend.checkpoint.staging import Staging
from reattend.errors import Refusal
from reattend.families.source import Source, source_of
from reattend.modeling.loading import load, load_tokenizer
from reattend.pipeline.planning import Plan, windows_of
from reattend.pipeline.stage import Stage
from reattend.pipeline.stored_statistics import StoredStatistics
from reattend.progress import Progress
from reattend.recipes.table import COLLECTIVE
from reattend.texts.reading import Text, check_separate, read_text
from reattend.transform import Passes, Setting, Statistics


class _Turn(NamedTuple):
    """What the first of several processes tells the others to calibrate with it."""

    stage: int
    model: Path
    statistics: Path


_DONE: _Turn | None = None


@dataclass(frozen=True)
class Calibration:
    """What calibration runs with: texts and all of their windows (windows, window), device, whom to tell."""

    plan: Plan
    texts: Mapping[str, Text]
    cut: Mapping[str, Tensor]
    device: str
    progress: Progress

    def records(self) -> dict[str, Any]:
        """Return what an output remembers of the texts, so that none of them is measured on."""
        records: dict[str, Any] = {}
        for number, teacher in enumerate(self.plan.teachers, 1):
            whose = "teacher's" if number == 1 else f"teacher {number}'s"
            earlier = earlier_texts(open_checkpoint(teacher))
            records |= {f"{whose} {purpose}": record for purpose, record in earlier.items()}
        return records | {
            purpose: {"sha256": text.sha256, "shingles": text.fingerprint} for purpose, text in self.texts.items()
        }

    def statistics(self, stage: Stage, model: Path, staging: Staging) -> Statistics:
        """Return a step's statistics on `model`, computing what the staging folder does not hold already."""
        if not stage.transform.texts:
            return {}
        statistics = StoredStatistics(staging.work / "statistics")
        if not statistics.complete:
            scratch = staging.work / "scratch"
            number = next(n for n, planned in enumerate(self.plan.stages) if planned.step is stage.step)
            processes.agree(_Turn(number, model, statistics.folder))
            self.gather(stage, statistics, model, scratch)
            statistics.finish()
            shutil.rmtree(scratch, ignore_errors=True)
        return statistics

    def gather(self, stage: Stage, statistics: StoredStatistics, model: Path, scratch: Path) -> None:
        """Run a step's calibration on `model`; of several processes each takes its part, and all meet at the end."""
        passes = self.passes(stage, model, scratch)
        if processes.count() == 1 or stage.name in COLLECTIVE:
            given: Statistics = {} if processes.rank() else statistics
            stage.transform.calibrate(stage.source, passes, given)
            return
        with statistics.divided() as divided:
            stage.transform.calibrate(stage.source, passes, divided)
            processes.meet()

    def follow(self) -> None:
        """Take part, as one of several processes, in what the first one does; that one alone writes the output."""
        while (turn := processes.agree(_DONE)) is not None:
            stage = self.plan.stages[turn.stage]
            if turn.stage:
                stage = replace(stage, source=source_of(open_checkpoint(turn.model)))
            self.gather(stage, StoredStatistics(turn.statistics), turn.model, Path(os.devnull))

    def passes(self, stage: Stage, folder: Path, scratch: Path) -> Passes:
        """Return what a step's calibration is given on the model in `folder`."""
        base = Path(self.plan.checkpoint.files.name)
        setting = Setting(
            folder, base, scratch, self._tokens(stage), self.plan.recipe.seed, self.device, self.progress
        )
        return _Passes(stage.source, setting)

    def _tokens(self, stage: Stage) -> dict[str, Tensor]:
        seed = self.plan.recipe.seed
        return {
            purpose: self.cut[purpose]
            if count is None
            else draw(self.cut[purpose], count, seed, self.texts[purpose].name)
            for purpose, count in windows_of(self.plan.recipe, stage).items()
        }


@dataclass(frozen=True)
class _Passes:
    """See `Passes`."""

    source: Source
    setting: Setting

    @cached_property
    def _model(self) -> Any:
        # fp32 where it costs no speed: statistics are better, and few CPUs compute in 16 bit.
        device = processes.own_device(self.setting.device)
        dtype = "float32" if device.startswith("cpu") else "auto"
        return load(self.setting.folder, dtype=dtype, device=device).model

    def __call__(self, *texts: str, windows: int | None = None) -> Iterator[LayerPass]:
        """See `Passes`."""
        cut = self.setting.tokens
        tokens = {text: cut[text][:windows] for text in texts or cut}
        device = processes.own_device(self.setting.device)
        for current in layer_passes(self._model, self.source.family, tokens, device):
            yield current
            self.setting.progress("calibrating", current.index + 1, self.source.num_layers)

    def losses(self, text: str, hidden_WTE: Tensor) -> Tensor:
        """See `Passes`."""
        return window_losses(self._model, self.source.family, self.setting.tokens[text], hidden_WTE)

    def logits(self, hidden_TE: Tensor) -> Tensor:
        """See `Passes`."""
        return logits_of(self._model, self.source.family, hidden_TE)


def prepare(planned: Plan, device: str, progress: Progress) -> Calibration:
    """Read and cut the texts that a plan needs, before anything is written.

    Raises `Refusal` where a text is not named, is too short or shares content with another, or where the
    model has no tokenizer.
    """
    texts = _texts(planned)
    if not texts:
        return Calibration(planned, {}, {}, device, progress)
    folder, recipe = Path(planned.checkpoint.files.name), planned.recipe
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise Refusal(f"{folder}: has no tokenizer, and calibration needs one")
    bos_each = "bos_every_window" in planned.source.family.features
    cut = {
        purpose: cut_tokens(text, tokenizer, window=recipe.window, bos_each=bos_each)
        for purpose, text in texts.items()
    }
    calibration = Calibration(planned, texts, cut, device, progress)
    for stage in planned.stages:
        calibration._tokens(stage)  # a text that is too short is refused now
    return calibration


def _texts(planned: Plan) -> dict[str, Text]:
    found = {}
    for purpose in planned.texts:
        source = getattr(planned.recipe, purpose)
        if source is None:
            raise Refusal(f"{purpose}: the recipe needs a text for it: pass --{purpose} FILE")
        found[purpose] = read_text(source)
    check_separate(found)
    return found


def earlier_texts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the texts that the source itself was made with: what it learned from them is still in it."""
    if MANIFEST not in checkpoint.sizes:
        return {}
    texts = read_json(checkpoint.files, checkpoint.sizes, MANIFEST).get("texts")
    if not isinstance(texts, dict) or not all(_is_record(record) for record in texts.values()):
        raise Refusal(f"{checkpoint.files.name}/{MANIFEST}: is damaged")
    return {f"earlier {purpose}": record for purpose, record in texts.items()}


def _is_record(record: Any) -> bool:
    """Whether this is a text's hash, alone as older outputs have it, or with a fingerprint."""
    if isinstance(record, str):
        return True
    return isinstance(record, dict) and isinstance(record.get("sha256"), str) and "shingles" in record
