"""Run a step's calibration and keep its statistics on disk, so that an interrupted run does it once."""

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from reattend.calibration.layerwise import LayerPass, layer_passes
from reattend.calibration.tokens import sample_tokens
from reattend.checkpoint.staging import Staging, write_whole
from reattend.errors import Refusal
from reattend.families.rows import Family
from reattend.modeling.loading import load
from reattend.pipeline.planning import Plan, Stage
from reattend.progress import Progress
from reattend.recipes.schema import Recipe
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
        tensors: dict[str, Tensor] = load_file(self._file(name))
        return tensors

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
    """What calibration runs with: the recipe's settings and texts, the device, whom to tell."""

    recipe: Recipe
    texts: Mapping[str, Text]
    device: str
    progress: Progress

    def statistics(self, stage: Stage, model: Path, staging: Staging) -> Statistics:
        """Return a step's statistics on `model`, computing what the staging folder does not hold already."""
        if not stage.transform.texts:
            return {}
        statistics = StoredStatistics(staging.work / "statistics")
        if not statistics.complete:
            stage.transform.calibrate(stage.source, self._passes(stage, model), statistics)
            statistics.finish()
        return statistics

    def _passes(self, stage: Stage, folder: Path) -> Passes:
        """Load the model once; each call of what is returned starts a pass over its layers."""
        # fp32 where it costs no speed: statistics are better, and few CPUs compute in 16 bit.
        model, tokenizer = load(folder, dtype="float32" if self.device == "cpu" else "auto")
        if tokenizer is None:
            raise Refusal(f"{folder}: has no tokenizer, and calibration needs one")
        family = stage.source.family
        tokens = {purpose: self._tokens(purpose, tokenizer, family) for purpose in stage.transform.texts}

        def passes() -> Iterator[LayerPass]:
            for current in layer_passes(model, family, tokens, self.device):
                yield current
                self.progress("calibrating", current.index + 1, stage.source.num_layers)

        return passes

    def _tokens(self, purpose: str, tokenizer: Any, family: Family) -> Tensor:
        counts = {"calibration": self.recipe.windows, "selection": self.recipe.selection_windows}
        return sample_tokens(
            self.texts[purpose], tokenizer, windows=counts[purpose], window=self.recipe.window,
            seed=self.recipe.seed, bos_each="bos_every_window" in family.features,
        )  # fmt: skip


def check_texts(planned: Plan) -> dict[str, Text]:
    """Read the texts that a plan needs. Raises `Refusal` where one is not named, or two share content."""
    found = {}
    for purpose in planned.texts:
        source = getattr(planned.recipe, purpose)
        if source is None:
            raise Refusal(f"{purpose}: the recipe needs a text for it: pass --{purpose} FILE")
        found[purpose] = read_text(source)
    check_separate(found)
    return found
