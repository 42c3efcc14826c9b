"""Models with some layers changed, measured on the selection text: many at once, in one pass over the weights.

Each trial carries its own hidden states through the layers, from the first one that it changes on.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from reattend.calibration.divided import missing
from reattend.calibration.layerwise import LayerPass
from reattend.calibration.search import stored_loss
from reattend.convert.attention_sharing.following import (
    Call,
    forget,
    own_follower,
    run_dropped,
    run_following,
    run_leading,
    run_plainly,
)
from reattend.transform import Passes, Statistics

TEXT = "selection"
_AT_ONCE = 16  # trials in one pass: each holds hidden states of all windows
# Gives the leader's head that each head of a follower follows, for (follower, leader).
Maps = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Trial:
    """Layers by the leader that they follow, and layers without attention."""

    leaders: Mapping[int, int] = field(default_factory=dict)
    dropped: frozenset[int] = frozenset()

    def with_leader(self, layer: int, leader: int) -> "Trial":
        """Return the trial with one more follower, or another leader for one."""
        return Trial({**self.leaders, layer: leader}, self.dropped)

    def without(self, layer: int) -> "Trial":
        """Return the trial with one more layer dropped."""
        return Trial(self.leaders, self.dropped | {layer})

    @property
    def changed(self) -> set[int]:
        """The layers that compute something else than the source's."""
        return {*self.leaders, *self.dropped}

    @property
    def name(self) -> str:
        """A name for the statistics, which tells trials apart."""
        said = f"{sorted(self.leaders.items())} {sorted(self.dropped)}"
        return f"trial-{int(hashlib.sha256(said.encode()).hexdigest(), 16) % 10**15}"


class Trials:
    """Losses of trials, measured where the statistics don't hold them yet. `maps` and `groups` (key heads) fold."""

    def __init__(self, passes: Passes, statistics: Statistics, maps: Maps, groups: int) -> None:
        self._passes, self._statistics, self._maps, self._groups = passes, statistics, maps, groups

    def losses(self, trials: Iterable[Trial]) -> list[float]:
        """Return each trial's loss in nats per token. Raises `BadNumbersError` where one is no number."""
        trials = list(trials)
        todo = [trial for name, trial in {t.name: t for t in trials}.items() if missing(self._statistics, name)]
        for first in range(0, len(todo), _AT_ONCE):
            self._measure(todo[first : first + _AT_ONCE])
        return [stored_loss(self._statistics, trial.name, _already) for trial in trials]

    def _measure(self, trials: list[Trial]) -> None:
        walks = [_Walk(trial) for trial in trials]
        for layer in self._passes(TEXT):
            for walk in walks:
                walk.enter(layer, self._follow)
            if any(walk.needs_source_calls(layer.index) for walk in walks):
                states = layer.hidden[TEXT].clone()
                calls = run_leading(layer, states)
                for walk in walks:
                    walk.take_source_calls(layer.index, calls)
            last = layer.hidden[TEXT]
        for walk in walks:
            states = last if walk.states is None else walk.states
            self._statistics[walk.trial.name] = {"losses": self._passes.losses(TEXT, states)}

    def _follow(self, layer: LayerPass, leader: int, states: Tensor, calls: list[Call]) -> None:
        follower = own_follower(layer, self._groups).folded(self._maps(layer.index, leader))
        run_following(layer, states, follower, calls)


def _already() -> Tensor:
    raise AssertionError("was measured before it was read")


class _Walk:
    """A trial on its way through the layers; `states` (W, T, E) is None while they are the source's."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.states: Tensor | None = None
        self._calls: dict[int, list[Call]] = {}
        self._leaders = set(trial.leaders.values())

    def enter(self, layer: LayerPass, follow: Callable[[LayerPass, int, Tensor, list[Call]], None]) -> None:
        """Go through a layer, if the states are no longer the source's after it."""
        index, trial = layer.index, self.trial
        if self.states is None:
            if index not in trial.changed:
                return
            self.states = layer.hidden[TEXT].clone()
        if index in trial.leaders:
            follow(layer, trial.leaders[index], self.states, self._calls[trial.leaders[index]])
        elif index in trial.dropped:
            run_dropped(layer, self.states)
        elif index in self._leaders:
            self._calls[index] = run_leading(layer, self.states)
        else:
            run_plainly(layer, self.states)
        forget(self._calls, trial.leaders, index)

    def needs_source_calls(self, index: int) -> bool:
        """Whether a layer leads in this trial, on the source's own states."""
        return self.states is None and index in self._leaders

    def take_source_calls(self, index: int, calls: list[Call]) -> None:
        """Keep what the source attended with in a layer that leads."""
        if self.needs_source_calls(index):
            self._calls[index] = calls
