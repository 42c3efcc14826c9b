"""What a step learned, kept on disk, so that an interrupted run learns it once, and several processes together."""

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor

from reattend import processes
from reattend.calibration.divided import STOPPED, DividedStatistics
from reattend.checkpoint.staging import write_whole
from reattend.errors import Failure, first_line
from reattend.transform import Statistics

_COMPLETE = "complete"


class StoredStatistics(MutableMapping[str, dict[str, Tensor]]):
    """Statistics in a folder, one safetensors file per name, written whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

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

        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self._file(name), save({key: value.contiguous() for key, value in tensors.items()}))

    def __delitem__(self, name: str) -> None:
        self._file(name).unlink()

    def __iter__(self) -> Iterator[str]:
        return (file.stem for file in sorted(self.folder.glob("*.safetensors")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def finish(self) -> None:
        """Declare the statistics complete."""
        write_whole(self.folder / _COMPLETE, b"")

    @contextmanager
    def divided(self) -> Iterator[Statistics]:
        """Give one of several processes its view of the statistics; where it comes to no end, tell the others."""
        stopped = self.folder / STOPPED
        if processes.rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            stopped.unlink(missing_ok=True)
        processes.meet()
        try:
            yield DividedStatistics(self, self.folder, processes.rank(), processes.count())
        except BaseException:
            with suppress(OSError):  # the first process may have removed the folder
                stopped.touch()
            raise

    @property
    def complete(self) -> bool:
        """Whether `finish` was reached."""
        return (self.folder / _COMPLETE).exists()
