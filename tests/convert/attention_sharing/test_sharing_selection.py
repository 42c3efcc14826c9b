"""Greedy choices, on losses from a table: what each layer costs, and what two of them cost together."""

import math

import pytest

from reattend.convert.attention_sharing.selection import Limit, choose_dropped, choose_followers
from reattend.errors import DeadEndError

FULL = ["full_attention"] * 7


class Table:
    """Losses by hand: layers cost what `alone` says, twice that with a leader two layers back, half with three."""

    def __init__(self, alone, together=()):
        self.alone, self.together = alone, dict(together)
        self.asked = []

    def losses(self, trials):
        trials = list(trials)
        self.asked += trials
        return [self.loss(trial) for trial in trials]

    def loss(self, trial):
        factor = {1: 1.0, 2: 2.0, 3: 0.5, 4: 4.0}
        cost = sum(self.alone[layer] * factor[layer - leader] for layer, leader in trial.leaders.items())
        cost += sum(self.alone[layer] for layer in trial.dropped)
        return cost + sum(extra for pair, extra in self.together.items() if set(pair) <= trial.changed)


def test_the_cheapest_go_first_and_what_they_cost_together_counts():
    table = Table([9, 5, 1, 2, 3, 4, 6], {(2, 3): 10})
    chosen, losses = choose_dropped(table, FULL, Limit(count=3))
    assert chosen.dropped == {2, 4, 5}
    assert losses == [0, 1, 4, 8]


def test_leaders_attend_by_themselves_and_better_ones_are_found():
    table = Table([9, 5, 1, 1.5, 3, 4, 6])
    chosen, losses = choose_followers(table, FULL, Limit(count=2))
    # 2 follows 1 at first (1.0); then 3 would follow 1 too, for 3.0, as 2 follows: 4, for 3.0, comes later in order.
    assert set(chosen.leaders) == {2, 3}
    assert chosen.leaders[3] == 0  # three layers back costs half
    assert losses[-1] == pytest.approx(table.loss(chosen))
    for trial in table.asked:
        assert not set(trial.leaders) & set(trial.leaders.values())


def test_layers_of_two_types_do_not_share():
    kinds = ["sliding_attention", "full_attention"] * 3
    chosen, _ = choose_followers(Table([1] * 6), kinds, Limit(count=2))
    assert all(kinds[layer] == kinds[leader] for layer, leader in chosen.leaders.items())
    dropped, _ = choose_dropped(Table([0, 0, 1, 1, 1, 1]), kinds, Limit(count=4))
    assert dropped.dropped == {2, 3, 4, 5}


def test_a_budget_ends_the_choice():
    budget = math.expm1(3.5)
    chosen, losses = choose_dropped(Table([9, 5, 1, 2, 3, 4, 6]), FULL, Limit(budget=budget))
    assert chosen.dropped == {2, 3}
    assert losses == [0, 1, 3]
    with pytest.raises(DeadEndError, match="7 layers: no more than 6"):
        choose_dropped(Table([1] * 7), FULL, Limit(count=7))
