"""The training loop: accelerate's processes and AdamW; a step depends on what came before and on nothing else."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from reattend import processes
from reattend.errors import DeadEndError
from reattend.families.source import Source
from reattend.healing.batches import batch_of, rate, share
from reattend.healing.objective import PARTS, Objective, Recorder, Seen, see
from reattend.healing.parameters import (
    as_written,
    choose_trained,
    find_parameters,
    matches,
    once,
    optimiser_for,
    trained_specs,
)
from reattend.healing.scales import Scaled, scales_of
from reattend.healing.settings import Settings
from reattend.healing.splitting import is_split
from reattend.healing.states import Record, States
from reattend.progress import Progress

_MOST_NATS = 700.0  # its exponential is near the largest double


@dataclass(frozen=True)
class Data:
    """Windows of ids (windows, tokens) to train and to evaluate on, the seed of their order, and where to compute."""

    training: Tensor
    selection: Tensor
    seed: int
    device: str


class Trainer:
    """A student under training: see `run`. `student` and `teacher` are models of transformers, in evaluation mode."""

    def __init__(self, settings: Settings, source: Source, data: Data, student: Any, teacher: Any) -> None:
        self.settings, self._source, self._data = settings, source, data
        self._device = torch.device(data.device)
        self._teacher = teacher
        self._watch = Recorder(teacher, source.family, settings, teacher=True) if teacher is not None else None
        self._objective = Objective(student, source.family, settings)
        every = find_parameters(student, source)
        self._stored = choose_trained(every, source, settings)
        self._parameters = once(self._stored)
        self._scaled = Scaled(self._parameters, scales_of(self._parameters, every))
        self._optimiser = optimiser_for(self._parameters, settings)
        self._wrapped: nn.Module | None = None

    @cached_property
    def _accelerator(self) -> Any:
        from accelerate import Accelerator

        return Accelerator(mixed_precision="no", cpu=self._device.type == "cpu")

    def run(self, record: Record, states: States, progress: Progress) -> Record:
        """Train from where `record` is to the last step; return the record at the end, whose best weights are kept.

        Raises `DeadEndError` for a loss that is no number.
        """
        with _deterministic(self._device):
            if record.step:
                states.load(self._parameters, self._optimiser)
            else:
                self._evaluate(record, states)
            self._tell(record, progress)
            while record.step < self.settings.steps:
                record.curve.append(self._step(record.step))
                record.step += 1
                last = record.step == self.settings.steps
                if last or record.step % self.settings.evaluate_every == 0:
                    self._evaluate(record, states)
                if last or record.step % self.settings.save_every == 0:
                    states.save(record, self._parameters, self._optimiser)
                self._tell(record, progress)
        return record

    def _tell(self, record: Record, progress: Progress) -> None:
        per_step = self.settings.batch * self._data.training.shape[1]
        loss = f"loss {record.curve[-1][0]:.4g}, " if record.curve else ""
        seen = f"selection {record.evaluations[-1][1]:.4g}"
        progress("healing", record.step * per_step, self.settings.steps * per_step, loss + seen)

    def _step(self, step: int) -> list[float]:
        """Take one step; return its loss, the norm of its gradient, and the parts of the loss, all before it."""
        self._set_rates(step)
        module = self._prepared(step)
        numbers = batch_of(step, self.settings.batch, len(self._data.training), self._data.seed)
        parts = torch.zeros(1 + len(PARTS), dtype=torch.float64)
        mine = share(numbers, processes.rank(), processes.count(), self.settings.micro_batch)
        for number, micro in enumerate(mine, 1):
            with nullcontext() if number == len(mine) else self._accelerator.no_sync(module):
                parts += self._backward(module, self._data.training[micro].to(self._device))
        parts = self._sum(parts) / self.settings.batch
        norm = self._clip()
        if not (bool(parts.isfinite().all()) and math.isfinite(norm)):
            raise DeadEndError(f"heal: step {step + 1}: the loss is {float(parts[0])}, its gradient's norm {norm}: "
                               "lower learning_rate, or raise warmup")  # fmt: skip
        with self._scaled.divided():
            self._optimiser.step()
        self._optimiser.zero_grad()
        return [float(parts[0]), norm, *parts[1:].tolist()]

    def _backward(self, module: nn.Module, ids_BT: Tensor) -> Tensor:
        """Add the gradient of a micro-batch's share of the step; return its loss and parts, sums over windows."""
        loss, parts = module(ids_BT, self._shown(ids_BT))
        # Gradients are averaged over the processes, and each adds its share of a sum.
        self._accelerator.backward(loss * (processes.count() / self.settings.batch))
        return torch.cat((loss.detach()[None], parts)).double().cpu()

    def _shown(self, ids_BT: Tensor) -> Seen | None:
        if self._watch is None:
            return None
        with torch.no_grad():
            return see(self._teacher, self._watch, ids_BT, self.settings.precision)

    def _set_rates(self, step: int) -> None:
        settings = self.settings
        for group in self._optimiser.param_groups:
            start = 0 if group["new"] else settings.new_steps
            most = settings.new_learning_rate if group["new"] else None
            share_ = rate(step, start, settings.steps, settings.warmup)
            group["lr"] = (settings.learning_rate if most is None else most) * share_

    def _prepared(self, step: int) -> nn.Module:
        """Return the module to run: wrapped anew when the parameters that are trained change."""
        if self._wrapped is None or step == self.settings.new_steps:
            for name, parameter in self._parameters.items():
                parameter.requires_grad_(step >= self.settings.new_steps or matches(name, self.settings.new))
            self._wrapped = self._wrap()
        return self._wrapped

    def _wrap(self) -> nn.Module:
        """Let gradients be averaged over the processes, unless the sharding does."""
        if processes.count() == 1 or is_split(self._objective):
            return self._objective
        from accelerate.utils import DistributedDataParallelKwargs

        # A head without kl and labels gets no gradient, which has to be found out.
        partly = DistributedDataParallelKwargs(find_unused_parameters=not (self.settings.kl or self.settings.labels))
        self._accelerator.ddp_handler = partly
        return self._accelerator.prepare_model(self._objective)  # type: ignore[no-any-return]

    def _clip(self) -> float:
        """Return the norm of the gradient (of rows scaled to 1), which is then at most `clip_norm`.

        In fp64: sums of millions of squares in fp32 differ in the fifth digit by how they are split.
        """
        gradients = self._scaled.gradients()
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
        square = torch.stack(norms).square().sum()
        norm = float((self._sum(square) if is_split(self._objective) else square).sqrt())
        if self.settings.clip_norm is not None and norm > self.settings.clip_norm:
            for gradient in gradients:
                gradient.mul_(self.settings.clip_norm / norm)
        return norm

    def _evaluate(self, record: Record, states: States) -> None:
        """Measure the weights as they would be written; keep them where they are the best so far, or the last."""
        with as_written(self._parameters, self._source):
            loss, nats = self._measure()
            if not (math.isfinite(loss) and nats < _MOST_NATS):
                raise DeadEndError(f"heal: step {record.step}: the loss on the selection text is {loss}: "
                                   "lower learning_rate, or raise warmup")  # fmt: skip
            better = loss < record.best_loss or self.settings.keep == "last"
            record.evaluations.append((record.step, loss, nats))
            if better:
                record.best = record.step
                if record.step:  # else the input holds them
                    states.save_best(record, self._stored, trained_specs(self._source, self.settings))

    def _measure(self) -> list[float]:
        """Return the weighted loss on the selection text and the next-token loss, nats; means over windows.

        Every process runs as many windows.
        """
        windows, ways = self._data.selection, processes.count()
        losses = torch.zeros(len(windows), 2, dtype=torch.float64)
        for first in range(0, len(windows), ways):
            number = first + processes.rank()
            ids_T = windows[number % len(windows)].to(self._device)
            measured = self._objective.measure(ids_T, self._shown(ids_T[None]))
            if number < len(windows):
                losses[number] = measured.cpu()
        means: list[float] = self._sum(losses).mean(0).tolist()
        return means

    def _sum(self, values: Tensor) -> Tensor:
        """Sum over the processes."""
        if processes.count() == 1:
            return values.cpu()
        summed: Tensor = self._accelerator.reduce(values.to(self._device), "sum")
        return summed.cpu()


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Allow no operator on a CPU whose result depends on chance; those of a GPU are left as they are."""
    before = torch.are_deterministic_algorithms_enabled()
    memory: Any = torch.utils.deterministic
    filling = memory.fill_uninitialized_memory
    try:
        if device.type == "cpu":
            torch.use_deterministic_algorithms(True)
            memory.fill_uninitialized_memory = False  # costs time, and nobody reads it
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        memory.fill_uninitialized_memory = filling
