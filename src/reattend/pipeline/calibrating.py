"""Run a step's calibration and keep its statistics on disk, so that an interrupted run does it once."""

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from reattend.calibration.layerwise import LayerPass, layer_passes, window_losses
from reattend.calibration.tokens import sample_tokens
from reattend.checkpoint.index import MANIFEST, Checkpoint, read_json
from reattend.checkpoint.staging import Staging, write_whole
from reattend.errors import Failure, Refusal, first_line
from reattend.families.source import Source
from reattend.modeling.loading import load, load_tokenizer
from reattend.pipeline.planning import Plan, Stage
from reattend.progress import Progress
from reattend.texts.reading import Text, check_separate, read_text
from reattend.transform import Passes, Statistics

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
    """What calibration runs with: texts and their tokens (windows, window) by purpose, device, whom to tell."""

    texts: Mapping[str, Text]
    tokens: Mapping[str, Tensor]
    device: str
    progress: Progress

    def records(self) -> dict[str, Any]:
        """Return what an output remembers of the texts, so that none of them is measured on."""
        return {
            purpose: {"sha256": text.sha256, "shingles": text.fingerprint} for purpose, text in self.texts.items()
        }

    def statistics(self, stage: Stage, model: Path, staging: Staging) -> Statistics:
        """Return a step's statistics on `model`, computing what the staging folder does not hold already."""
        if not stage.transform.texts:
            return {}
        statistics = StoredStatistics(staging.work / "statistics")
        if not statistics.complete:
            stage.transform.calibrate(stage.source, self.passes(stage, model), statistics)
            statistics.finish()
        return statistics

    def passes(self, stage: Stage, folder: Path) -> Passes:
        """Load the model once, for any number of passes over its layers."""
        # fp32 where it costs no speed: statistics are better, and few CPUs compute in 16 bit.
        model, _ = load(folder, dtype="float32" if self.device.startswith("cpu") else "auto", device=self.device)
        tokens = {purpose: self.tokens[purpose] for purpose in stage.transform.texts}
        return _Passes(model, stage.source, tokens, self.device, self.progress)


@dataclass(frozen=True)
class _Passes:
    """See `Passes`."""

    model: Any
    source: Source
    tokens: Mapping[str, Tensor]
    device: str
    progress: Progress

    def __call__(self, *texts: str, windows: int | None = None) -> Iterator[LayerPass]:
        """See `Passes`."""
        tokens = {text: self.tokens[text][:windows] for text in texts or self.tokens}
        for current in layer_passes(self.model, self.source.family, tokens, self.device):
            yield current
            self.progress("calibrating", current.index + 1, self.source.num_layers)

    def losses(self, text: str, hidden_WTE: Tensor) -> Tensor:
        """See `Passes`."""
        return window_losses(self.model, self.source.family, self.tokens[text], hidden_WTE)


def prepare(planned: Plan, device: str, progress: Progress) -> Calibration:
    """Read and cut the texts that a plan needs, before anything is written.

    Raises `Refusal` where a text is not named, is too short or shares content with another, or where the
    model has no tokenizer.
    """
    texts = _texts(planned)
    if not texts:
        return Calibration({}, {}, device, progress)
    folder, recipe = Path(planned.checkpoint.files.name), planned.recipe
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise Refusal(f"{folder}: has no tokenizer, and calibration needs one")
    counts = {"calibration": recipe.windows, "selection": recipe.selection_windows}
    tokens = {
        purpose: sample_tokens(
            text, tokenizer, windows=counts[purpose], window=recipe.window, seed=recipe.seed,
            bos_each="bos_every_window" in planned.source.family.features,
        )
        for purpose, text in texts.items()
    }  # fmt: skip
    return Calibration(texts, tokens, device, progress)


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
