"""Run token windows through a model layer by layer: each layer's weights are in memory once, alone.

With a model that accelerate offloads to disk, the peak is one layer plus the hidden states of all windows,
and every weight is read once per pass, however many windows there are.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reattend.calibration.shared_attention import SharedAttention, to_device
from reattend.errors import BadNumbersError, Failure
from reattend.families.rows import Family

# Called with a submodule, its positional and named arguments, and its output.
Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]


@dataclass
class LayerPass:
    """One layer with its weights in memory, and what every window of every text feeds it.

    `hidden` maps a text's name to (windows, tokens, hidden size), on the CPU in the model's dtype; `text` names
    the one that is running.
    """

    index: int
    module: nn.Module
    hidden: dict[str, Tensor]
    device: torch.device
    _arguments: tuple[tuple[Any, ...], dict[str, Any]]
    _shared: SharedAttention
    text: str = ""
    _ran: bool = False

    def call(self, inputs: Tensor, window: int | None = None) -> Tensor:
        """Run the layer on `inputs` (1, tokens, hidden size), with the model's own masks and positions.

        A follower needs the number of the window of `text`: it attends with what its leader made of that one.
        """
        args, kwargs = self._arguments
        with self._shared.of(self.index, (self.text, window), self.device) as left:
            output = self.module(inputs.to(self.device), *args, **(kwargs | left))
        if not isinstance(output, Tensor):
            raise Failure(f"layer {self.index}: returns {type(output).__name__}, a tensor was expected")
        return output

    def bad_numbers(self, where: str) -> BadNumbersError:
        """Return the error for NaN or inf at a place in the layer, naming a weight that holds some, if one does."""
        named = self.module.named_parameters()
        weight = next((name for name, value in named if not bool(torch.isfinite(value).all())), None)
        reason = f"its tensor {weight!r} does" if weight else f"they overflow in {self.hidden[self.text].dtype}"
        return BadNumbersError(f"layer {self.index}, {where}: activations hold NaN or inf ({reason})")

    def run(self, hooks: Iterable[tuple[str, Hook]] = ()) -> None:
        """Run the layer on every window and replace `hidden` by its outputs, once.

        `hooks` pair submodules, as `self_attn.k_proj`, with what is called after each of their calls.
        """
        if self._ran:
            raise RuntimeError(f"layer {self.index} ran already: its inputs are gone")
        with ExitStack() as stack, torch.inference_mode():
            for name, hook in hooks:
                module = self.module.get_submodule(name)
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            for text, states in self.hidden.items():
                self.text = text
                for i in range(len(states)):
                    states[i : i + 1].copy_(self.call(states[i : i + 1], i))
                    if not bool(torch.isfinite(states[i]).all()):
                        raise self.bad_numbers("its output")
        self._ran = True


def layer_passes(
    model: nn.Module, family: Family, tokens: Mapping[str, Tensor], device: str | torch.device = "cpu"
) -> Iterator[LayerPass]:
    """Yield a `LayerPass` per layer, in order; `tokens` maps names to ids (windows, tokens).

    All texts must have the same window length. A layer that the consumer did not `run` is run after it. The
    weights are on `device` only while their layer is current.
    """
    layers = layers_in(model, family)
    hidden, arguments = _first_inputs(model, layers, tokens)
    shared = SharedAttention(getattr(model.config, "attention_sharing", None))
    device = torch.device(device)
    with _resident_bank(model, device):
        for index, layer in enumerate(layers):
            with _resident(layer, device):
                current = LayerPass(index, layer, hidden, device, to_device(arguments[index], device), shared)
                yield current
                if not current._ran:
                    current.run()


def window_losses(model: Any, family: Family, ids_WT: Tensor, hidden_WTE: Tensor) -> Tensor:
    """Return each window's mean next-token loss in nats (W,), fp64, given what the last layer put out for it."""
    losses = []
    for ids, logits in zip(ids_WT, _headed(model, family, ids_WT, hidden_WTE), strict=True):
        loss = torch.nn.functional.cross_entropy(logits[:-1].float(), ids[1:].to(logits.device))
        losses.append(loss.double().cpu())
    return torch.stack(losses)


def logits_of(model: Any, family: Family, hidden_TE: Tensor) -> Tensor:
    """Return what the model's final norm and head make of hidden states: logits (T, V), fp32, on the CPU."""
    ids = torch.zeros(1, len(hidden_TE), dtype=torch.long)  # which ones does not matter: no layer reads them
    return next(_headed(model, family, ids, hidden_TE[None].to(model.dtype))).float().cpu()


def _headed(model: Any, family: Family, ids_WT: Tensor, hidden_WTE: Tensor) -> Iterator[Tensor]:
    """Yield each window's logits (T, V), given what the last layer put out for it."""
    first = _Given()
    with _replaced(layers_in(model, family), first, _Recorder), _resident(model, _input_device(model)):
        for ids, hidden in zip(ids_WT, hidden_WTE, strict=True):
            first.hidden = hidden[None].to(_input_device(model))
            with torch.inference_mode():
                logits: Tensor = model(ids[None].to(first.hidden.device), use_cache=False).logits[0]
            yield logits


def layers_in(model: nn.Module, family: Family) -> nn.ModuleList:
    """Return the layers of a model, in order. Raises `Failure` where they are not at the family's place."""
    for name in (family.prefix + family.layer, family.layer):
        try:
            found = model.get_submodule(name)
        except AttributeError:
            continue
        assert isinstance(found, nn.ModuleList), name
        return found
    raise Failure(f"{type(model).__name__}: has no {family.prefix}{family.layer}")


class _Recorder(nn.Module):
    """Stands in for a layer: passes its input on and keeps the other arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: Tensor | None = None
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Keep the arguments; return `hidden` as it is."""
        self.inputs, self.arguments = hidden, (args, kwargs)
        return hidden


class _Given(nn.Module):
    """Stands in for the first layer where the outputs of all layers are known."""

    hidden: Tensor

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what was given."""
        return self.hidden


@contextmanager
def _replaced(layers: nn.ModuleList, first: nn.Module, others: Callable[[], nn.Module]) -> Iterator[None]:
    """Put stand-ins in the place of the layers."""
    originals = list(layers)
    try:
        for i in range(len(originals)):
            layers[i] = others() if i else first
        yield
    finally:
        for i, layer in enumerate(originals):
            layers[i] = layer


def _first_inputs(
    model: nn.Module, layers: nn.ModuleList, tokens: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[Any]]:
    """Return every window's input to the first layer, and each layer's other arguments.

    Those depend on the window's length alone (masks, positions), as no window is padded: one set serves all.
    """
    if len({ids.shape[1] for ids in tokens.values()}) != 1:
        raise ValueError("texts must be cut into windows of one length")
    first = _Recorder()
    recorders = [first]

    def another() -> _Recorder:
        recorders.append(_Recorder())
        return recorders[-1]

    with _replaced(layers, first, another), _resident(_body(model), _input_device(model)):
        hidden = {name: _embed(model, first, ids) for name, ids in tokens.items()}
    return hidden, [recorder.arguments for recorder in recorders]


def _embed(model: nn.Module, first: _Recorder, ids: Tensor) -> Tensor:
    rows = []
    with torch.inference_mode():
        for i in range(len(ids)):
            _body(model)(ids[i : i + 1].to(_input_device(model)), use_cache=False)
            assert first.inputs is not None
            rows.append(first.inputs.cpu().clone())
    return torch.cat(rows)


def _body(model: Any) -> Any:
    """The model without its head, whose logits nobody needs here."""
    return getattr(model, model.base_model_prefix, model)


def _input_device(model: Any) -> torch.device:
    device: torch.device = model.device
    return torch.device("cpu") if device.type == "meta" else device


@contextmanager
def _resident_bank(model: Any, device: torch.device) -> Iterator[None]:
    """Keep on `device` what a portable model's layers share of their weights."""
    bank = getattr(_body(model), "dictionary", None)
    with nullcontext() if bank is None else _resident(bank, device):
        yield


@contextmanager
def _resident(layer: nn.Module, device: torch.device) -> Iterator[None]:
    """Keep a layer's weights on `device`, loading what accelerate offloaded once instead of per call."""
    hooks: list[tuple[nn.Module, Any]] = [(m, m._hf_hook) for m in layer.modules() if hasattr(m, "_hf_hook")]
    offloaded = [(m, hook) for m, hook in hooks if getattr(hook, "offload", False)]
    homes = [hook.execution_device for _, hook in hooks]
    home = next(layer.parameters()).device
    try:
        for _, hook in hooks:
            hook.execution_device = device
        for module, hook in offloaded:
            hook.pre_forward(module)
            hook.offload = False
        if not offloaded:
            layer.to(device)
        yield
    finally:
        for module, hook in offloaded:
            hook.offload = True
            hook.post_forward(module, None)
        for (_, hook), old in zip(hooks, homes, strict=True):
            hook.execution_device = old
        if not offloaded:
            layer.to(home)
