"""Statistics that several processes gather together: which of them makes an entry, and waiting for what others make.

Each process runs the same calibration over the same tokens. What it would compute for a layer is left to one of them,
and read from the folder that they share: so every number is made by one process, as if that ran alone.
"""

import time
from collections.abc import Iterable, Iterator, MutableMapping
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

from reattend.errors import Failure

Statistics: TypeAlias = MutableMapping[str, dict[str, Tensor]]

STOPPED = "stopped"  # the file that says that one of the processes came to no end
_PAUSE = 0.05  # seconds between two looks at the folder


def missing(statistics: Statistics, name: str) -> bool:
    """Return whether an entry is not there and this process is the one to make it.

    Where another makes it, reading it afterwards waits. The number that a name ends in, a layer's, decides who.
    """
    return statistics.missing(name) if isinstance(statistics, DividedStatistics) else name not in statistics


def any_missing(statistics: Statistics, names: Iterable[str]) -> bool:
    """Return whether `missing` is true of any of `names`."""
    answers = [missing(statistics, name) for name in names]  # asked of all: each is promised from then on
    return any(answers)


def undivided(statistics: Statistics) -> Statistics | None:
    """Return the statistics for what can't be divided: the first process does it all, the others (None) nothing."""
    if not isinstance(statistics, DividedStatistics):
        return statistics
    return None if statistics.rank else statistics.stored


class DividedStatistics(MutableMapping[str, dict[str, Tensor]]):
    """What process `rank` of `count` sees of the statistics `stored` in a `folder` that all of them share.

    An entry that it is not to make itself is promised once it was asked for by `missing` or set; reading it waits,
    and raises `Failure` when the folder is gone or says that a process stopped.
    """

    def __init__(self, stored: Statistics, folder: Path, rank: int, count: int) -> None:
        self.rank = rank
        self.stored, self._folder, self._count = stored, folder, count
        self._promised: set[str] = set()

    def missing(self, name: str) -> bool:
        """See `missing`."""
        if self._owns(name):
            return name not in self.stored
        self._promised.add(name)
        return False

    def _owns(self, name: str) -> bool:
        digits = name[len(name.rstrip("0123456789")) :]
        return int(digits or "0") % self._count == self.rank

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        while name in self._promised and name not in self.stored:
            if not self._folder.is_dir() or (self._folder / STOPPED).exists():
                raise Failure(f"{self._folder}: another process stopped before it had made {name!r}")
            time.sleep(_PAUSE)
        return self.stored[name]

    def __contains__(self, name: object) -> bool:
        return name in self._promised or name in self.stored

    def __setitem__(self, name: str, tensors: dict[str, Tensor]) -> None:
        if self._owns(name):
            self.stored[name] = tensors
        else:
            self._promised.add(name)

    def __delitem__(self, name: str) -> None:
        self._promised.discard(name)
        if self._owns(name):
            del self.stored[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self.stored, *self._promised}))

    def __len__(self) -> int:
        return sum(1 for _ in self)
