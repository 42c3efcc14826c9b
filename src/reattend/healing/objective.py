"""The student with its losses as one module, and what a teacher shows it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reattend.calibration.layerwise import layers_in
from reattend.families.rows import Family
from reattend.healing.losses import kl_divergence, next_token_loss, outlier_excess, relative_error
from reattend.healing.settings import Settings

PARTS = ("kl", "hidden", "labels", "outliers")
# The linears whose outputs are added to the residual stream, by the last part of their names in the family rows.
_WRITERS = ("o_proj", "out_proj", "down_proj", "fc2", "c_proj")


class Seen(NamedTuple):
    """One forward pass: logits (B, T - 1, V) of what follows; outputs (B, T, E) of layers and writers where asked."""

    logits: Tensor
    hidden: list[Tensor]
    written: list[Tensor]


class Recorder:
    """Hooks that keep what layers and the linears at their ends put out, while a pass is being recorded."""

    def __init__(self, model: nn.Module, family: Family, settings: Settings, *, teacher: bool = False) -> None:
        self._on = False
        self._kept: tuple[list[Tensor], list[Tensor]] = ([], [])
        for layer in layers_in(model, family):
            if settings.hidden:
                layer.register_forward_hook(self._keeping(0))
            for name in family.linears if settings.outliers and not teacher else ():
                if name.rpartition(".")[2] in _WRITERS:
                    layer.get_submodule(name).register_forward_hook(self._keeping(1))

    def _keeping(self, place: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._on:
                self._kept[place].append(output if isinstance(output, Tensor) else output[0])

        return hook

    @contextmanager
    def recording(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Record the passes within; afterwards nothing is kept, also where layers run again in the backward pass."""
        self._on, self._kept = True, ([], [])
        try:
            yield self._kept
        finally:
            self._on, self._kept = False, ([], [])


def see(model: nn.Module, recorder: Recorder, ids_BT: Tensor, precision: str) -> Seen:
    """Run a model on windows."""
    half = torch.autocast(ids_BT.device.type, torch.bfloat16, enabled=precision == "bf16")
    with half, recorder.recording() as (hidden, written):
        logits = model(ids_BT, use_cache=False).logits[:, :-1]
    return Seen(logits, hidden, [output.view(*ids_BT.shape, -1) for output in written])  # OPT's FFN has (B x T, E)


class Objective(nn.Module):
    """The student and its weighted loss: a mean over the tokens of each window, summed over the windows."""

    def __init__(self, model: nn.Module, family: Family, settings: Settings) -> None:
        super().__init__()
        self.model = model
        self._settings = settings
        self._recorder = Recorder(model, family, settings)

    def forward(self, ids_BT: Tensor, teacher: Seen | None) -> tuple[Tensor, Tensor]:
        """Return the loss, and its parts unweighted and without gradient (those in `PARTS`, 0 where not asked)."""
        return self._weigh(self._see(ids_BT), teacher, ids_BT)

    def _see(self, ids_BT: Tensor) -> Seen:
        return see(self.model, self._recorder, ids_BT, self._settings.precision)

    def _weigh(self, seen: Seen, teacher: Seen | None, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        total, parts = torch.zeros((), device=ids_BT.device), []
        for name in PARTS:
            weight = getattr(self._settings, name)
            part = self._part(name, seen, teacher, ids_BT).sum() if weight else torch.zeros_like(total)
            total = total + weight * part
            parts.append(part.detach())
        return total, torch.stack(parts)

    def _part(self, name: str, seen: Seen, teacher: Seen | None, ids_BT: Tensor) -> Tensor:
        if name == "labels":
            return next_token_loss(seen.logits, ids_BT[:, 1:])
        if name == "outliers":
            return outlier_excess(seen.written, self._settings.outlier_limit)
        assert teacher is not None
        if name == "hidden":
            return relative_error(seen.hidden, teacher.hidden)
        return kl_divergence(seen.logits, teacher.logits, self._settings.temperature)

    @torch.no_grad()
    def measure(self, ids_T: Tensor, teacher: Seen | None) -> Tensor:
        """Return one window's weighted loss, and its mean next-token loss in nats (2,), fp64."""
        seen = self._see(ids_T[None])
        loss, _ = self._weigh(seen, teacher, ids_T[None])
        return torch.stack((loss, next_token_loss(seen.logits, ids_T[None, 1:])[0])).double()
