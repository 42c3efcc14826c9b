"""Followers fitted, in order: what each puts out behind those before it, to what the source's layer puts out.

As in the refit of the step `mla`: o_proj by least squares, all projections by a few dozen steps, o_proj again.

Legend: W windows, T tokens, E hidden, Z = H D what the heads found.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from reattend.calibration.fitting import Schedule, output_error, solve_linear
from reattend.calibration.layerwise import LayerPass
from reattend.calibration.orthogonal import OrthogonalMomentum
from reattend.convert.attention_sharing.following import (
    MODULE,
    Call,
    Follower,
    forget,
    run_following,
    run_leading,
    run_plainly,
)
from reattend.errors import Failure

_FIT, _CHOOSE = "calibration", "selection"


@dataclass(frozen=True)
class Fitted:
    """A follower, and its output's error on the selection text: folded, after least squares, after the steps."""

    follower: Follower
    errors: Mapping[str, float]


@dataclass(frozen=True)
class Seen:
    """What a follower reads (W, T, E), what it attends with, and what it should put out (W, T, E), of one text."""

    x_WTE: Tensor
    calls: list[Call]
    target_WTE: Tensor

    def mixed(self, follower: Follower) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what the heads find (T, Z) and the target (T, E), by window."""
        for x_TE, call, target_TE in zip(self.x_WTE, self.calls, self.target_WTE, strict=True):
            with torch.inference_mode():
                yield follower.mix(x_TE[None], call), target_TE

    def error(self, follower: Follower) -> float:
        """Return the follower's `output_error`."""
        with torch.inference_mode():
            ours = torch.stack([follower.put_out(mixed) for mixed, _ in self.mixed(follower)])
            return float(output_error(ours, self.target_WTE))


def fit(follower: Follower, calibration: Seen, selection: Seen, schedule: Schedule) -> Fitted:
    """Return the best of a folded follower, its o_proj solved, and all of it fitted, by the selection text.

    Raises `FloatingPointError` for numbers that are not finite.
    """
    solved = solve_output(follower, calibration)
    tried = {
        "folded": follower, "solved": solved,
        "fitted": solve_output(descend(solved, calibration, schedule), calibration),
    }  # fmt: skip
    errors = {name: selection.error(one) for name, one in tried.items()}
    return Fitted(tried[min(errors, key=errors.__getitem__)], errors)


def solve_output(follower: Follower, seen: Seen) -> Follower:
    """Return the follower with o_proj, and its bias if there is one, solved by least squares."""
    weight_EZ, bias_E = follower.output_EHD.flatten(1), follower.output_bias_E
    if bias_E is None:
        solved = solve_linear(weight_EZ, seen.mixed(follower))
    else:
        padded = ((nn.functional.pad(mixed, (0, 1), value=1.0), target) for mixed, target in seen.mixed(follower))
        solved = solve_linear(torch.cat([weight_EZ, bias_E[:, None]], 1), padded)
        bias_E = solved[:, -1].clone()
    output_EHD = solved[:, : weight_EZ.shape[1]].reshape(follower.output_EHD.shape)
    return replace(follower, output_EHD=output_EHD, output_bias_E=bias_E)


def descend(follower: Follower, seen: Seen, schedule: Schedule) -> Follower:
    """Return the follower after steps on v_proj and o_proj, head by head; biases stay."""
    values = follower.value_GDE.clone().requires_grad_()
    outputs_HED = follower.output_EHD.transpose(0, 1).clone().requires_grad_()
    descent = OrthogonalMomentum([values, outputs_HED])
    for step in range(schedule.steps):
        now = replace(follower, value_GDE=values, output_EHD=outputs_HED.transpose(0, 1))
        taken = [(step * schedule.windows + n) % len(seen.calls) for n in range(schedule.windows)]
        ours = torch.stack([now.put_out(now.mix(seen.x_WTE[w : w + 1], seen.calls[w])) for w in taken])
        loss = output_error(ours, seen.target_WTE[taken])
        if not math.isfinite(float(loss.detach())):
            raise FloatingPointError(f"refit: the loss at step {step} is {float(loss.detach())}")
        loss.backward()  # type: ignore[no-untyped-call]
        descent.step(schedule.rate_at(step))
    return replace(follower, value_GDE=values.detach(), output_EHD=outputs_HED.detach().transpose(0, 1))


class Prefix:
    """The hidden states (W, T, E) of every text as the layers so far leave them, followers among them."""

    def __init__(self, hidden: Mapping[str, Tensor], leaders: Mapping[int, int]) -> None:
        self.states = {text: states.clone() for text, states in hidden.items()}
        self._leaders = leaders
        self._calls: dict[int, dict[str, list[Call]]] = {}

    def seen(self, layer: LayerPass) -> dict[str, Seen]:
        """Run a layer on the source's states; return what a follower in its place sees, by text, fp32 on the CPU."""
        missing = {text: layer.hidden[text].float() - states.float() for text, states in self.states.items()}
        outputs = _watch(layer)
        norm, calls = layer.module.get_submodule("input_layernorm"), self._calls[self._leaders[layer.index]]
        found = {}
        for text, states in self.states.items():
            with torch.no_grad():
                x_WTE = torch.cat([norm(one[None].to(layer.device)).cpu().float() for one in states])
            found[text] = Seen(x_WTE, calls[text], missing.pop(text).add_(outputs.pop(text)))
        return found

    def advance(self, layer: LayerPass, follower: Follower | None) -> None:
        """Put the states through the layer, with a follower in the place of its attention."""
        leads = layer.index in self._leaders.values()
        for text, states in self.states.items():
            if follower is not None:
                run_following(layer, states, follower, self._calls[self._leaders[layer.index]][text])
            elif leads:
                self._calls.setdefault(layer.index, {})[text] = run_leading(layer, states)
            else:
                run_plainly(layer, states)
        forget(self._calls, self._leaders, layer.index)


def _watch(layer: LayerPass) -> dict[str, Tensor]:
    """Run a layer; return its attention's outputs (W, T, E) by text."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in layer.hidden}

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        outputs[layer.text].append((output[0] if isinstance(output, tuple) else output).cpu().float())

    layer.run([(MODULE, watch)])
    return {name: torch.cat(found) for name, found in outputs.items()}


def fit_layer(layer: LayerPass, prefix: Prefix, folded: Follower, schedule: Schedule) -> Fitted:
    """Return the fitted follower of a layer. Raises `Failure` naming it where numbers are not finite."""
    seen = prefix.seen(layer)
    try:
        return fit(folded, seen[_FIT], seen[_CHOOSE], schedule)
    except FloatingPointError as error:
        raise Failure(f"attention_sharing: layer {layer.index}: {error}") from error
