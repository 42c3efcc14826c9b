"""A training run on the disk: weights, moments and record in one file that appears whole or not at all.

Tensors go to the file one at a time, gathered from all processes where they are split: saving takes the memory of
one tensor. No random state is kept: nothing in training draws a number (see `batches`; dropout is off).
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reattend import processes
from reattend.checkpoint.header import TensorSpec, render_header
from reattend.checkpoint.tensors import TORCH_DTYPES, tensor_bytes
from reattend.errors import Failure, first_line
from reattend.healing.splitting import spread, whole

_STATE = "state.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")  # as AdamW calls them


@dataclass
class Record:
    """What a run has done: `curve` holds each step's [loss, norm of the gradient, *parts of the loss]; `evaluations`
    (step, weighted loss on the selection text, next-token loss there in nats); `best` is the step whose weights are
    kept; `key` is what must not change.
    """

    key: str
    step: int = 0
    best: int = 0
    curve: list[list[float]] = field(default_factory=list)
    evaluations: list[tuple[int, float, float]] = field(default_factory=list)

    @property
    def best_loss(self) -> float:
        """The least weighted loss on the selection text."""
        return min((loss for _, loss, _ in self.evaluations), default=float("inf"))


class States:
    """The files of a run in a folder; only the process that is `main` touches them, and all must call."""

    def __init__(self, folder: Path, *, main: bool) -> None:
        self._folder, self._main = folder, main
        self._saved_best = 0
        if main:
            folder.mkdir(parents=True, exist_ok=True)

    def load_record(self) -> Record | None:
        """Return the record of an interrupted run, if there is one; only in the main process."""
        if not self._main or not (self._folder / _STATE).exists():
            return None
        with _opened(self._folder / _STATE) as file:
            record = Record(**json.loads(file.metadata()["record"]))
        self._saved_best = record.best
        self._clear(record)
        return record

    def save(self, record: Record, parameters: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> None:
        """Write the state; the best weights that it does not name any more go."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            tensors[name] = parameter.detach()
            for key, value in optimiser.state.get(parameter, {}).items():
                tensors[f"{key}:{name}"] = value
        specs = [TensorSpec(name, "F32", tuple(tensor.shape)) for name, tensor in tensors.items()]
        self._write(_STATE, specs, lambda name: tensors[name], {"record": json.dumps(asdict(record))})
        self._saved_best = record.best
        self._clear(record)

    def load(self, parameters: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> None:
        """Put the state of the main process into the parameters and moments of all."""
        with _opened(self._folder / _STATE) if self._main else _Nothing() as file:
            begun = processes.agree(set(file.keys()) if self._main else set())
            for name, parameter in parameters.items():
                places = {name: parameter.detach()}
                if f"step:{name}" in begun:
                    state = {"step": torch.zeros(())} | {key: torch.zeros_like(parameter) for key in _MOMENTS}
                    optimiser.state[parameter] = state
                    places |= {f"{key}:{name}": value.detach() for key, value in state.items()}
                for stored, place in places.items():
                    spread(place, file.get_tensor(stored) if self._main else None)

    def save_best(self, record: Record, parameters: Mapping[str, nn.Parameter], specs: Iterable[TensorSpec]) -> None:
        """Keep the weights of this step, in the dtypes in which they are written, as the best so far."""
        held = [spec for spec in specs if spec.name in parameters]
        self._write(_best(record), held, lambda name: parameters[name].detach(), {})
        self._clear(record)

    def best(self, record: Record) -> Any:
        """Open the best weights, a safetensors file to read from; only in the main process."""
        return _opened(self._folder / _best(record))

    def _clear(self, record: Record) -> None:
        """Remove best weights that neither the run nor what it would resume from needs."""
        needed = {_best(record), f"best-{self._saved_best}.safetensors"}
        for file in self._folder.glob("best-*") if self._main else ():
            if file.name not in needed:
                file.unlink()

    def _write(
        self, file: str, specs: list[TensorSpec], tensor_of: Callable[[str], Tensor], metadata: dict[str, str]
    ) -> None:
        header, starts = render_header(specs, metadata)
        partial = self._folder / f"{file}.partial"
        with partial.open("wb") if self._main else _Nothing() as stream:
            if self._main:
                stream.write(header)
            for spec in specs:
                data = whole(tensor_of(spec.name))
                if self._main:
                    stream.seek(starts[spec.name])
                    stream.write(tensor_bytes(data.to(TORCH_DTYPES[spec.dtype])))
            if self._main:
                stream.flush()
                os.fsync(stream.fileno())
        if self._main:
            partial.rename(self._folder / file)


def _best(record: Record) -> str:
    return f"best-{record.best}.safetensors"


class _Nothing:
    """What a process that touches no files has in the place of one."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _opened(path: Path) -> Any:
    from safetensors import safe_open

    try:
        return safe_open(path, "pt")
    except Exception as error:
        raise Failure(f"{path}: is damaged ({first_line(error)}); start again with --overwrite") from error
