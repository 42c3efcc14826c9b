"""Run a step's calibration and keep its statistics on disk, so that an interrupted run does it once."""

import shutil
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from reattend.calibration.layerwise import LayerPass, layer_passes, window_losses
from reattend.calibration.tokens import cut_tokens, draw
from reattend.checkpoint.index import MANIFEST, Checkpoint, open_checkpoint, read_json
from reattend.checkpoint.staging import Staging, write_whole
from reattend.errors import Failure, Refusal, first_line
from reattend.families.source import Source
from reattend.modeling.loading import load, load_tokenizer
from reattend.pipeline.planning import Plan, Stage, windows_of
from reattend.progress import Progress
from reattend.texts.reading import Text, check_separate, read_text
from reattend.transform import Passes, Setting, Statistics

_COMPLETE = "complete"


class StoredStatistics(MutableMapping[str, dict[str, Tensor]]):
    """Statistics in a folder, one safetensors file per name, written whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        if not self._file(name).exists():
            raise KeyError(name)
        try:
            tensors: dict[str, Tensor] = load_file(self._file(name))
        except Exception as error:
            raise Failure(
                f"{self._file(name)}: is damaged ({first_line(error)}); start again with --overwrite"
            ) from error
        return tensors

    def __contains__(self, name: object) -> bool:
        return self._file(str(name)).exists()

    def __setitem__(self, name: str, tensors: dict[str, Tensor]) -> None:
        from safetensors.torch import save

        self._folder.mkdir(parents=True, exist_ok=True)
        write_whole(self._file(name), save({key: value.contiguous() for key, value in tensors.items()}))

    def __delitem__(self, name: str) -> None:
        self._file(name).unlink()

    def __iter__(self) -> Iterator[str]:
        return (file.stem for file in sorted(self._folder.glob("*.safetensors")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def finish(self) -> None:
        """Declare the statistics complete."""
        write_whole(self._folder / _COMPLETE, b"")

    @property
    def complete(self) -> bool:
        """Whether `finish` was reached."""
        return (self._folder / _COMPLETE).exists()


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
            passes = self.passes(stage, model, staging.work / "scratch")
            stage.transform.calibrate(stage.source, passes, statistics)
            statistics.finish()
            shutil.rmtree(passes.setting.scratch, ignore_errors=True)
        return statistics

    def pending(self, staging: Staging) -> bool:
        """Whether the only step of a recipe is still to be calibrated."""
        return not staging.finished and not StoredStatistics(staging.work / "statistics").complete

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
        device = self.setting.device
        dtype = "float32" if device.startswith("cpu") else "auto"
        return load(self.setting.folder, dtype=dtype, device=device).model

    def __call__(self, *texts: str, windows: int | None = None) -> Iterator[LayerPass]:
        """See `Passes`."""
        cut = self.setting.tokens
        tokens = {text: cut[text][:windows] for text in texts or cut}
        for current in layer_passes(self._model, self.source.family, tokens, self.setting.device):
            yield current
            self.setting.progress("calibrating", current.index + 1, self.source.num_layers)

    def losses(self, text: str, hidden_WTE: Tensor) -> Tensor:
        """See `Passes`."""
        return window_losses(self._model, self.source.family, self.setting.tokens[text], hidden_WTE)


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
