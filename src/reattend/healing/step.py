"""The step `heal`: train a model, after surgery, on a text and against a teacher; only values change."""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reattend import processes
from reattend.checkpoint.files import open_files
from reattend.checkpoint.index import fingerprint, open_checkpoint
from reattend.checkpoint.tensors import TORCH_DTYPES
from reattend.errors import Refusal
from reattend.families.attention_kinds import KEY
from reattend.families.source import Source, source_of
from reattend.healing.loop import Data, Trainer
from reattend.healing.models import check_memory, check_tokenizers, load_student, load_teacher, training_bytes
from reattend.healing.objective import PARTS
from reattend.healing.parameters import TRAINED, matches, trained_specs
from reattend.healing.settings import Settings
from reattend.healing.states import Record, States
from reattend.transform import Group, Passes, Setting, Statistics

_MOST_POINTS = 200  # of the curve that an output keeps
_TRAINING = "training"


class Heal(Settings):
    """Fine-tuning after surgery."""

    @property
    def tolerance(self) -> float:
        """Relative L2 of logits: training moves them as far as surgery had, so only what looks broken is caught."""
        return 1.0

    @property
    def texts(self) -> tuple[str, ...]:
        """The calibration text is trained on; losses on the selection text say which weights are kept."""
        return ("calibration", "selection")

    def check(self, source: Source) -> list[str]:
        """Refuse what can't be trained, patterns that match nothing, and a teacher that does not fit."""
        _check_source(source)
        specs = trained_specs(source, self)
        for pattern in (*self.train, *self.new):
            if not any(matches(spec.name, (pattern,)) for spec in specs):
                raise Refusal(f"heal: {pattern!r} (train, new) matches no tensor that is trained")
        if self.teacher is not None:
            self._check_teacher(source, source_of(open_checkpoint(self.teacher)))
        numbers = sum(spec.numel for spec in specs)
        remarks = [f"{len(specs)} tensors with {numbers} numbers are trained; teacher: {self.teacher or 'the input'}"]
        if KEY in source.config:
            remarks.append(f"config.json's {KEY} stays, and training runs exact attention")
        return remarks

    def _check_teacher(self, source: Source, teacher: Source) -> None:
        if source.size("vocab") != teacher.size("vocab"):
            sizes = f"{teacher.size('vocab')} tokens, the model has {source.size('vocab')}"
            raise Refusal(f"heal: teacher: {self.teacher} has {sizes}")
        if self.hidden and (source.num_layers, source.size("hidden")) != (teacher.num_layers, teacher.size("hidden")):
            sizes = f"{teacher.num_layers} layers of {teacher.size('hidden')}, the model {source.num_layers} of "
            raise Refusal(f"heal: hidden: {self.teacher} has {sizes}{source.size('hidden')}")

    def calibrate(self, source: Source, passes: Passes, statistics: Statistics) -> None:
        """Train; put the best weights into `statistics`, in the dtypes in which they are written."""
        self._check_processes()
        where = passes.setting
        teacher = self._teacher(where)
        key = _key(teacher)
        device = processes.own_device(where.device)
        check_memory(source, self, device)
        states = States(where.scratch, main=processes.rank() == 0)
        record = processes.agree(states.load_record()) or Record(key)
        if record.key != key:
            raise Refusal("heal: the interrupted run had another teacher; use --overwrite")
        student = load_student(where.folder, source, self, device)
        model = None if teacher is None else load_teacher(teacher, source, self, device)
        data = Data(where.tokens["calibration"], where.tokens["selection"], where.seed, device)
        record = Trainer(self, source, data, student, model).run(record, states, where.progress)
        if processes.rank() == 0:
            self._keep(source, record, states, statistics)

    def _check_processes(self) -> None:
        many = processes.count()
        if self.batch % many:
            raise Refusal(f"heal: batch: {self.batch} windows can't be shared evenly by {many} processes")
        for engine in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
            if os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() not in ("false", "0"):
                raise Refusal(f"heal: ACCELERATE_USE_{engine} is set: use torchrun, and shard: true for FSDP")

    def _teacher(self, where: Setting) -> Path | None:
        """Return the teacher's folder; none where no loss needs one."""
        if not self.distils:
            return None
        teacher = where.base if self.teacher is None else open_files(self.teacher).download()
        own = teacher.resolve() == where.folder.resolve()
        if own and not (self.labels or self.outliers or self.norm_decay or self.weight_decay):
            raise Refusal("heal: the model would be its own teacher, with nothing to learn: name one (--teacher)")
        if self.teacher is not None and not own:
            check_tokenizers(where.folder, teacher)
        return teacher

    def _keep(self, source: Source, record: Record, states: States, statistics: Statistics) -> None:
        if record.best:
            with states.best(record) as best:
                stored = set(best.keys())
                for number, spec in enumerate(trained_specs(source, self)):
                    if spec.name in stored:
                        statistics[f"tensor-{number}"] = {"values": best.get_tensor(spec.name)}
        content = json.dumps(_findings(record, self)).encode()
        statistics[_TRAINING] = {"findings": torch.frombuffer(bytearray(content), dtype=torch.uint8)}

    def statistics_bytes(self, source: Source) -> int:
        """Weights and moments, an older copy while a newer one is written, and the best weights three times."""
        trained = trained_specs(source, self)
        return sum(2 * 12 * spec.numel + 3 * spec.nbytes for spec in trained)

    def calibration_bytes(self, source: Source) -> int:
        """Return what training takes in memory beside the process: see `training_bytes`."""
        return training_bytes(source, self)

    @property
    def undecided(self) -> bool:
        """What is written is known from the start."""
        return False

    def settled(self, findings: Mapping[str, Any]) -> "Heal":
        """Return the step itself."""
        return self

    def groups(self, source: Source) -> Iterator[Group]:
        """Yield each trained tensor by itself."""
        for number, spec in enumerate(trained_specs(source, self)):
            yield Group((spec.name,), (spec,), key=f"tensor-{number}")

    def apply(
        self, group: Group, tensors: Mapping[str, Tensor], statistics: Statistics, source: Source
    ) -> dict[str, Tensor]:
        """Return the trained tensor; as it was where no step was better than the start, and where it is a buffer."""
        (spec,) = group.writes
        if group.key not in statistics:
            return {spec.name: tensors[spec.name]}
        return {spec.name: statistics[group.key]["values"].to(TORCH_DTYPES[spec.dtype])}

    def edit_config(self, source: Source, statistics: Statistics) -> dict[str, Any]:
        """Return the config as it is."""
        return dict(source.config)

    def side_files(self, source: Source, statistics: Statistics) -> Iterator[tuple[str, bytes]]:
        """Yield nothing: all is in the weights."""
        yield from ()

    def findings(self, statistics: Statistics) -> dict[str, Any]:
        """Return what training measured; see `_findings`."""
        found: dict[str, Any] = json.loads(bytes(statistics[_TRAINING]["findings"].tolist()))
        return found

    def engines(self, source: Source) -> dict[str, str]:
        """The format is the input's."""
        return dict.fromkeys(("transformers", "vllm", "sglang"), "as the input")


def _check_source(source: Source) -> None:
    name = source.family.model_type
    if "quantization_config" in source.config:
        raise Refusal("config.json: quantization_config: quantised codes can't be trained; heal before quantising")
    if "encoder" in source.family.features:
        raise Refusal(f"heal: {name} is an encoder, and the losses are those of next tokens")
    if "experts" in source.family.features:
        raise Refusal(f"heal: {name} is not supported: transformers stacks its experts in other tensors")
    for spec in source.tensors.values():
        if len(spec.shape) > 1 and spec.dtype not in (*TRAINED, "BOOL"):
            raise Refusal(f"heal: tensor {spec.name!r} is {spec.dtype}; {', '.join(TRAINED)} can be trained")


def _key(teacher: Path | None) -> str:
    """Return what tells whether a run goes on with the teacher that it began with: headers, and times of change."""
    if teacher is None:
        return ""
    checkpoint = open_checkpoint(teacher)
    times = [(teacher / file).stat().st_mtime_ns for file in sorted(checkpoint.digests)]
    return hashlib.sha256(json.dumps([fingerprint(checkpoint), times]).encode()).hexdigest()


def _findings(record: Record, settings: Settings) -> dict[str, Any]:
    """Return the curve (thinned; each point the loss before its step), the evaluations, and what was kept."""
    stride = math.ceil(len(record.curve) / _MOST_POINTS)
    points = [(number + 1, row) for number, row in enumerate(record.curve) if number % stride == 0]
    columns = ("loss", "gradient_norm", *(part for part in PARTS))
    curve: dict[str, list[float]] = {"step": [step for step, _ in points]}
    curve |= {
        name: [row[i] for _, row in points]
        for i, name in enumerate(columns)
        if i < 2 or getattr(settings, name)
    }  # fmt: skip
    losses = {str(step): loss for step, loss, _ in record.evaluations}
    perplexities = {str(step): math.exp(nats) for step, _, nats in record.evaluations}
    selection = {"selection_loss": losses, "selection_perplexity": perplexities}
    return {"kept_step": record.best, **selection, "curve": curve}
