"""Which layers follow which, or have no attention at all: greedy, by perplexity measured on the selection text.

Every layer is tried alone first. Then one is added at a time: of the best by that first score, each is tried with
what is chosen already.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from reattend.calibration.search import rise
from reattend.convert.attention_sharing.trials import Trial, Trials
from reattend.errors import DeadEndError

_TRIED = 6  # candidates that each addition tries, of all that are left
REACH = 4  # how far back a leader may be
BUDGET = 0.1  # where a recipe says nothing


@dataclass(frozen=True)
class Limit:
    """When to stop: at a number of layers, or before perplexity rises by more than a share (else `BUDGET`)."""

    count: int | None = None
    budget: float | None = None

    @property
    def most(self) -> float | None:
        """The largest share by which perplexity may rise."""
        return BUDGET if self.count is None and self.budget is None else self.budget

    def reached(self, chosen: int) -> bool:
        """Whether so many layers are enough."""
        return self.count is not None and chosen >= self.count

    def allows(self, loss: float, base: float) -> bool:
        """Whether a loss in nats is within the budget."""
        return self.most is None or rise(loss, base) <= self.most


def choose_followers(trials: Trials, kinds: Sequence[str], limit: Limit) -> tuple[Trial, list[float]]:
    """Return followers and their leaders, and the losses from none on; `kinds` are the layers' types.

    A leader is first the nearest earlier layer of the same type that attends by itself; in the end others, up to
    `REACH` layers back, are tried for each follower.
    """

    def additions(trial: Trial) -> Iterator[tuple[int, Trial]]:
        for layer in range(1, len(kinds)):
            nearest = next(_leaders(trial, layer, kinds), None)
            if layer not in trial.leaders and layer not in trial.leaders.values() and nearest is not None:
                yield layer, trial.with_leader(layer, nearest)

    chosen, losses = _greedy(trials, additions, limit)
    for layer in sorted(chosen.leaders):
        others = [chosen.with_leader(layer, leader) for leader in _leaders(chosen, layer, kinds)]
        measured = trials.losses(others)
        best = min(range(len(others)), key=measured.__getitem__)
        chosen, losses[-1] = others[best], measured[best]
    return chosen, losses


def _leaders(trial: Trial, layer: int, kinds: Sequence[str]) -> Iterator[int]:
    """Yield the layers that one may follow, the nearest first."""
    for leader in range(layer - 1, max(layer - REACH, 0) - 1, -1):
        if leader not in trial.leaders and kinds[leader] == kinds[layer]:
            yield leader


def choose_dropped(trials: Trials, kinds: Sequence[str], limit: Limit) -> tuple[Trial, list[float]]:
    """Return layers to leave without attention, and the losses from none on; the first of each type stays."""
    first = {kinds.index(kind) for kind in kinds}

    def additions(trial: Trial) -> Iterator[tuple[int, Trial]]:
        for layer in range(len(kinds)):
            if layer not in first and layer not in trial.dropped:
                yield layer, trial.without(layer)

    return _greedy(trials, additions, limit)


def _greedy(
    trials: Trials, additions: Callable[[Trial], Iterator[tuple[int, Trial]]], limit: Limit
) -> tuple[Trial, list[float]]:
    chosen = Trial()
    alone = dict(additions(chosen))
    losses = trials.losses([chosen])
    score = dict(zip(alone, trials.losses(alone.values()), strict=True))
    while not limit.reached(len(chosen.changed)):
        left = dict(additions(chosen))
        tried = sorted(left, key=score.__getitem__)[:_TRIED]
        if not tried:
            break
        measured = dict(zip(tried, trials.losses(left[layer] for layer in tried), strict=True))
        best = min(tried, key=measured.__getitem__)
        if not limit.allows(measured[best], losses[0]):
            break
        chosen = left[best]
        losses.append(measured[best])
    if not chosen.changed or (limit.count is not None and len(chosen.changed) < limit.count):
        wanted = f"budget {limit.most}" if limit.count is None else f"{limit.count} layers"
        most = len(chosen.changed)
        raise DeadEndError(f"{wanted}: no more than {most} layers can be chosen (measured on the selection text)")
    return chosen, losses
