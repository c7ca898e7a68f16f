"""The inequalities and the time of a step, against numbers worked out by hand, and at the limits."""

from __future__ import annotations

import math

import pytest
from made_up_costs import MS, costs, demand

from pyengine.planner.inequalities import ALL, FIRST, StepShape, inequalities, step_time

#: Four tokens, none of which costs anything beside layers and experts.
FOUR = StepShape(tokens=4, outputs=4, cells=0, slots=100)


def test_reading_longer_than_computing_is_waited_for() -> None:
    # One layer: attention 1.4 ms. 3 hot experts of 2 rows: 3 x 1.1 = 3.3 ms. 4 cold ones of 1 row, 1 ms each, arrive at
    # 3, 5, 7, 9 ms: the last is done at 10 ms. Kernels 7.3 ms, so 2.7 ms of waiting.
    found = step_time(costs(), FOUR, demand(3, 6, 4, 4))
    assert found.total == pytest.approx(10 * (1.4 + 10) * MS)
    assert found.attention == pytest.approx(14 * MS)
    assert found.experts == pytest.approx(73 * MS)
    assert found.waiting == pytest.approx(27 * MS)
    assert found.reading == pytest.approx(90 * MS)


def test_the_three_by_hand() -> None:
    ahead, first, every = inequalities(costs(), FOUR, demand(3, 6, 4, 4))
    assert (ahead.computing, ahead.reading) == (pytest.approx(1.4 * MS), 0) and ahead.holds
    assert (first.name, first.computing, first.reading) == (FIRST, pytest.approx(3.3 * MS), pytest.approx(3 * MS))
    assert first.holds
    # Of 9 ms of reading, 3.3 + 3 x 1 are hidden.
    assert (every.name, every.computing, every.reading) == (ALL, pytest.approx(6.3 * MS), pytest.approx(9 * MS))
    assert not every.holds


def test_what_holds_is_what_is_not_waited_for() -> None:
    for hot in range(0, 20, 2):
        for cold in range(6):
            load = demand(hot, 2 * hot, cold, cold)
            waits = step_time(costs(), FOUR, load).waiting > 1e-12
            assert waits != all(one.holds for one in inequalities(costs(), FOUR, load)), (hot, cold)


def test_experts_that_are_fetched_ahead_come_during_attention() -> None:
    # Half of 4 is 2; attention of 1.4 ms has room for 0.7. Those compute with the hot: 3.3 + 0.7 ms; 3.3 come later.
    ahead, first, every = inequalities(costs(recall=0.5), FOUR, demand(3, 6, 4, 4))
    assert ahead.reading == pytest.approx(1.4 * MS) and ahead.computing == pytest.approx(1.4 * MS)
    assert first.computing == pytest.approx(4.0 * MS)
    assert every.computing == pytest.approx(6.3 * MS) and every.reading == pytest.approx((1 + 3.3 * 2) * MS)
    with_it, without = (step_time(costs(recall=r), FOUR, demand(3, 6, 4, 4)).total for r in (0.5, 0.0))
    assert with_it == pytest.approx(without - 10 * 1.4 * MS)


def test_infinite_bandwidth_hides_everything() -> None:
    fast = costs(transfer_s=0.0, latency_s=0.0)
    assert all(one.holds for one in inequalities(fast, FOUR, demand(0, 0, 8, 8)))
    assert step_time(fast, FOUR, demand(0, 0, 8, 8)).waiting == pytest.approx(0, abs=1e-12)


def test_no_bandwidth_never_ends_unless_nothing_is_missing() -> None:
    stopped = costs().with_bandwidth(0)
    assert math.isinf(step_time(stopped, FOUR, demand(3, 6, 1, 1)).total)
    assert not all(one.holds for one in inequalities(stopped, FOUR, demand(3, 6, 1, 1)))
    there = demand(4, 8, 0, 0)
    assert step_time(stopped, FOUR, there).total == pytest.approx(10 * (1.4 + 4.4) * MS)
    assert all(one.holds for one in inequalities(stopped, FOUR, there))


def test_a_bandwidth_that_is_no_limit_changes_nothing() -> None:
    assert costs().with_bandwidth(1e12) == costs()


def test_a_limit_of_the_disk_counts_over_a_step_and_leaves_it_its_own_pace() -> None:
    load, free = demand(3, 6, 4, 4), step_time(costs(), FOUR, demand(3, 6, 4, 4))
    limited = costs().with_bandwidth(1e8)  # 10 ms each
    found = step_time(limited, FOUR, load)
    assert found.total == pytest.approx(10 * 4 * 10 * MS)
    assert found.total - found.waiting == pytest.approx(free.total - free.waiting)
    assert not inequalities(limited, FOUR, load)[2].holds
    # Computing that takes as long as the limit anyway does not wait for it.
    slow = costs(layer=((1, 100 * MS), (2, 100 * MS)))
    assert step_time(slow.with_bandwidth(1e8), FOUR, load) == step_time(slow, FOUR, load)


def test_one_slot_overlaps_nothing() -> None:
    one = StepShape(tokens=4, outputs=4, cells=0, slots=1)
    # Each of 4: begins to come after 1 ms, there after 2 more, computes 1 ms; then the next.
    found = step_time(costs(), one, demand(0, 0, 4, 4))
    assert found.total == pytest.approx(10 * (1.4 + 4 * 4) * MS)
    assert not inequalities(costs(), one, demand(1, 1, 1, 1))[1].holds
    more = [step_time(costs(), StepShape(4, 4, 0, n), demand(0, 0, 4, 4)).total for n in (1, 2, 3, 50)]
    assert more == sorted(more, reverse=True) and more[0] > more[1] and more[2] == more[3]


def test_misses_that_were_corrected_move_between_here_and_missing() -> None:
    half = step_time(costs(miss_factor=0.5), FOUR, demand(3, 3, 4, 4))
    assert half.total == pytest.approx(step_time(costs(), FOUR, demand(5, 5, 2, 2)).total)
    double = step_time(costs(miss_factor=2.0), FOUR, demand(6, 6, 2, 2))
    assert double.total == pytest.approx(step_time(costs(), FOUR, demand(4, 4, 4, 4)).total)


def test_context_outputs_and_choosing_tokens_are_counted() -> None:
    whole = costs(cell_s=1e-6, output_s=2 * MS, host_s=3 * MS)
    plain = step_time(costs(), FOUR, demand(3, 6, 0, 0)).total
    found = step_time(whole, StepShape(4, 4, 500, 100), demand(3, 6, 0, 0)).total
    assert found - plain == pytest.approx(4 * 512 * 1e-6 + 3 * 2 * MS + 4 * 3 * MS)


def test_beginning_is_paid_once_by_those_that_are_here() -> None:
    for cold in (0, 2):
        plain, more = (step_time(costs(pass_s=p), FOUR, demand(3, 6, cold, cold)) for p in (0.0, 0.5 * MS))
        assert more.experts - plain.experts == pytest.approx(10 * 0.5 * MS)
    assert step_time(costs(pass_s=1.0), FOUR, demand(0, 0, 2, 2)).experts < 0.1


@pytest.mark.parametrize("name", ["transfer_s", "latency_s", "pass_s", "cell_s", "output_s", "host_s"])
def test_nothing_becomes_faster_by_costing_more(name: str) -> None:
    shape = StepShape(4, 4, 300, 100)
    times = [step_time(costs(**{name: value * MS}), shape, demand(2, 4, 3, 3)).total for value in (0, 0.01, 1, 9)]
    assert times == sorted(times)


def test_what_is_missing_computes_longer_and_in_groups() -> None:
    # As in the first test, but a missing expert takes 0.5 ms more: 4 of 1.5 ms, the last one done at 10.5 ms.
    slower = costs(miss=((1, 0.5 * MS), (2, 1 * MS)))
    found = step_time(slower, FOUR, demand(3, 6, 4, 4))
    assert found.experts == pytest.approx(10 * (3.3 + 4 * 1.5) * MS)
    assert found.total == pytest.approx(10 * (1.4 + 10.5) * MS)
    # If the last ones come together, they compute for 3 ms after 9 ms of reading, but never more than are missing.
    groups = costs(rest=((1, 3 * MS), (2, 3 * MS)))
    assert step_time(groups, FOUR, demand(3, 6, 4, 4)).total == pytest.approx(10 * (1.4 + 12) * MS)
    assert step_time(groups, FOUR, demand(3, 6, 1, 1)).total == step_time(costs(), FOUR, demand(3, 6, 1, 1)).total
    assert step_time(groups, FOUR, demand(3, 6, 0, 0)).waiting == 0
