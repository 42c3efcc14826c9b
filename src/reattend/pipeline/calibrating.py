"""Run a step's calibration and keep its statistics on disk, so that an interrupted run does it once."""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from reattend.calibration.layerwise import LayerPass, layer_passes
from reattend.calibration.tokens import sample_tokens
from reattend.checkpoint.staging import Staging
from reattend.errors import Refusal
from reattend.families import Family
from reattend.modeling.loading import load
from reattend.pipeline.planning import Plan, Stage
from reattend.progress import Progress
from reattend.recipes.schema import Recipe
from reattend.texts.reading import Text, check_separate, read_text
from reattend.transform import Passes

_NAMES = "names.json"


class Statistics(Mapping[str, dict[str, Tensor]]):
    """Named groups of tensors in a folder, each read from its file when asked for."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._names: list[str] = json.loads((folder / _NAMES).read_text("utf-8")) if folder else []

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        if self._folder is None:
            raise KeyError(name)
        tensors: dict[str, Tensor] = load_file(self._folder / f"{self._names.index(name)}.safetensors")
        return tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Calibration:
    """What calibration runs with: the recipe's settings and texts, the device, whom to tell."""

    recipe: Recipe
    texts: Mapping[str, Text]
    device: str
    progress: Progress

    def statistics(self, stage: Stage, model: Path, staging: Staging) -> Statistics:
        """Return a step's statistics on `model`, computing them unless the staging folder holds them already."""
        if not stage.transform.texts:
            return Statistics(None)
        folder = staging.work / "statistics"
        if not (folder / _NAMES).exists():
            shutil.rmtree(folder, ignore_errors=True)
            _save(stage.transform.calibrate(stage.source, self._passes(stage, model)), staging)
        return Statistics(folder)

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


def _save(statistics: Iterator[tuple[str, dict[str, Tensor]]], staging: Staging) -> None:
    """Write each group of tensors as it comes; the list of names, written last, declares them complete."""
    from safetensors.torch import save

    names: list[str] = []
    for name, tensors in statistics:
        data = save({key: value.contiguous() for key, value in tensors.items()})
        staging.add_file(f"work/statistics/{len(names)}.safetensors", data)
        names.append(name)
    staging.add_file(f"work/statistics/{_NAMES}.partial", json.dumps(names).encode())
    partial = staging.work / "statistics" / f"{_NAMES}.partial"
    partial.rename(partial.with_name(_NAMES))
