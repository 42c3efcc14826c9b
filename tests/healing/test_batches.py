import math

import pytest

from reattend.healing.batches import batch_of, rate, share


@pytest.mark.parametrize(("batch", "windows"), [(4, 10), (3, 3), (7, 3), (1, 5)])
def test_every_window_once_per_epoch(batch, windows):
    drawn = [number for step in range(windows * 2) for number in batch_of(step, batch, windows, seed=5)]
    epochs = [drawn[start : start + windows] for start in range(0, len(drawn), windows)]
    assert all(sorted(epoch) == list(range(windows)) for epoch in epochs)
    assert windows == 1 or len({tuple(epoch) for epoch in epochs}) > 1


def test_a_step_depends_on_seed_and_number_alone():
    forwards = [batch_of(step, 4, 50, 1) for step in range(30)]
    assert [batch_of(step, 4, 50, 1) for step in reversed(range(30))] == forwards[::-1]
    assert batch_of(0, 4, 50, 1) != batch_of(0, 4, 50, 2)


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 3, 9])
def test_processes_share_a_step(processes, micro):
    shares = [share(list(range(8)), rank, processes, micro) for rank in range(processes)]
    assert sorted(number for mine in shares for part in mine for number in part) == list(range(8))
    assert len({tuple(map(len, mine)) for mine in shares}) == 1  # as many passes, as large, in each
    assert max(len(part) for part in shares[0]) <= micro


def test_rates_by_hand():
    rates = [rate(step, 2, 14, 4) for step in range(14)]
    assert rates[:6] == [0, 0, 0.25, 0.5, 0.75, 1]
    assert rates[6] == 1
    assert rates[10] == pytest.approx(0.5)
    assert rates[13] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert rate(0, 0, 1, 0) == 1
    assert rate(3, 0, 4, 9) == pytest.approx(4 / 9)
