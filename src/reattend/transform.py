"""The protocol of a transform: what it checks, which tensors go in and come out, what it edits."""

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from reattend.checkpoint.header import TensorSpec
from reattend.families.source import Source
from reattend.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from reattend.calibration.layerwise import LayerPass

# Named groups of tensors, each read from or written to the disk when it is asked for or set.
Statistics = MutableMapping[str, "dict[str, Tensor]"]


def layers_of(statistics: Statistics) -> list[str]:
    """Return the names of the entries that are a layer's, which its number is, in order."""
    return sorted((name for name in statistics if name.isdigit()), key=int)


@dataclass(frozen=True)
class Setting:
    """Where and on what a step calibrates.

    `folder` is the model's checkpoint, `base` the one that the recipe was given; `scratch` takes files of the step's
    own, kept across an interruption; `tokens` are ids (windows, window) by text; `seed` is the recipe's.
    """

    folder: Path
    base: Path
    scratch: Path
    tokens: "Mapping[str, Tensor]"
    seed: int
    device: str
    progress: Progress


class Passes(Protocol):
    """A model, loaded when the first pass begins, and the tokens of the step's texts."""

    @property
    def setting(self) -> Setting:
        """Where the model is, and what it is run on."""

    def __call__(self, *texts: str, windows: int | None = None) -> "Iterator[LayerPass]":
        """Start a pass over the layers: it reads the model's weights once more.

        It runs on `texts` (default: all), and of each on the first `windows` (default: all).
        """

    def losses(self, text: str, hidden_WTE: "Tensor") -> "Tensor":
        """Return each window's mean loss (W,), nats per token, given what the last layer put out for a text."""

    def logits(self, hidden_TE: "Tensor") -> "Tensor":
        """Return what the model's final norm and head make of hidden states: logits (T, V)."""


@dataclass(frozen=True)
class Group:
    """Tensors that are read together, and the tensors that are written in their place; `key` is the step's own."""

    reads: tuple[str, ...]
    writes: tuple[TensorSpec, ...]
    key: str = ""


class Transform(Protocol):
    """One step of a recipe. Instances are immutable and know no files."""

    def check(self, source: Source) -> list[str]:
        """Raise `Refusal` where the step can't apply; return remarks on what it leaves alone."""

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts that `calibrate` runs on: none, or `calibration`, or also `selection`."""

    def calibrate(self, source: Source, passes: Passes, statistics: "Statistics") -> None:
        """Run passes and put what is learned into `statistics`, by layer or as the step likes.

        Entries are kept on disk, also across an interruption: what is there already need not be made again.
        """

    def statistics_bytes(self, source: Source) -> int:
        """Return what statistics and side files take on the disk while the step runs, in bytes, at most."""

    @property
    def undecided(self) -> bool:
        """Whether calibration decides what is written: then only `settled` knows it."""

    def settled(self, findings: Mapping[str, Any]) -> "Transform":
        """Return the step with what calibration decided, from its `findings`; itself if nothing was open."""

    def groups(self, source: Source) -> Iterator[Group]:
        """Yield the groups; tensors in none of them are kept as they are."""

    def apply(
        self,
        group: Group,
        tensors: "Mapping[str, Tensor]",
        statistics: "Statistics",
        source: Source,
    ) -> "dict[str, Tensor]":
        """Turn a group's tensors into the ones that it writes. Pure; `statistics` is read when asked for.

        `tensors` lie in memory that the next group's are read into: nothing may hold on to them.
        """

    def edit_config(self, source: Source, statistics: "Statistics") -> dict[str, Any]:
        """Return the config of the result, a new dict; while planning, `statistics` is empty."""

    def side_files(self, source: Source, statistics: "Statistics") -> Iterator[tuple[str, bytes]]:
        """Yield (path within the output, content) of files beside the weights, one at a time; usually none."""

    def findings(self, statistics: "Statistics") -> dict[str, Any]:
        """Return what calibration measured and chose, as plain data for the output's `reattend.json`."""

    def engines(self, source: Source) -> dict[str, str]:
        """Say which engines can serve the result: engine -> "yes" or the reason why not."""

    @property
    def tolerance(self) -> float:
        """The relative L2 error of logits that `verify` allows; 0 for a lossless step."""
