"""The number of texts that is chosen: by hand, at the limits of memory and bandwidth, and against trying all."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from made_up_costs import MS, costs, shape

from pyengine.planner.costs import Costs
from pyengine.planner.demand import Demand
from pyengine.planner.solving import (
    BatchPlan,
    DoesNotFitError,
    Memory,
    Work,
    candidate,
    counts,
    solve,
    throughput,
)
from pyengine.planning.routing import uniform_routing

SHAPE = shape()
WORK = Work(prompt_tokens=32, answer_tokens=32)


@pytest.fixture(scope="module")
def demand() -> Demand:
    return Demand(uniform_routing(4, 8, 2), [range(4)])


def memory(share: float, kv: int = 2_000_000) -> Memory:
    """For that share of the experts, and so many bytes of KV cache: 1000 a token."""
    return Memory(limit=30_000_000 + kv + int(share * 32_000_000), fixed=30_000_000, per_cell=1000)


def planned(demand: Demand, given: Costs, of: Memory, work: Work = WORK, most: int = 32) -> BatchPlan:
    return solve(given, demand, SHAPE, of, work, most_sequences=most)


def test_one_text_suffices_where_nothing_is_read(demand: Demand) -> None:
    # All experts are here, and attention and kernels grow with tokens alone: more texts at once give nothing.
    linear = costs(layer=((1, 1 * MS),), expert=((1, 1 * MS),))
    plan = planned(demand, linear, memory(2.0))
    assert plan.n_sequences == plan.n_hidden == 1
    assert plan.chosen.slots == 32 and plan.chosen.missing == 0


def test_slow_reading_wants_more_texts_and_the_smallest_that_hide_it(demand: Demand) -> None:
    fast = planned(demand, costs(transfer_s=1.2 * MS, latency_s=0.0), memory(0.5))
    slow = planned(demand, costs(transfer_s=1.7 * MS, latency_s=0.0), memory(0.5))
    assert fast.n_hidden is not None and slow.n_hidden is not None
    assert 1 < fast.n_hidden < slow.n_hidden
    for plan in (fast, slow):
        assert plan.chosen.hidden and plan.n_sequences >= (plan.n_hidden or 0)
        for one in plan.tried:
            assert one.hidden or one.n_sequences != plan.n_hidden
        assert not any(one.hidden for one in plan.tried if one.n_sequences < (plan.n_hidden or 0))


def test_the_choice_is_near_the_best_of_all(demand: Demand) -> None:
    for transfer in (0.1, 1.0, 10.0, 100.0):
        given = costs(transfer_s=transfer * MS)
        plan = planned(demand, given, memory(0.5))
        every = [candidate(given, demand, SHAPE, memory(0.5), WORK, n, plan.chosen.prompt_chunk) for n in range(1, 33)]
        best = max(one.tokens_per_s for one in every if one is not None)
        assert plan.chosen.tokens_per_s >= 0.9 * best


def test_a_disk_that_is_too_slow_hides_nothing_and_the_best_is_taken(demand: Demand) -> None:
    plan = planned(demand, costs(transfer_s=1.0), memory(0.5))
    assert plan.n_hidden is None and not plan.chosen.hidden
    assert plan.chosen.tokens_per_s >= 0.95 * plan.best.tokens_per_s
    assert plan.n_sequences > 16, "each expert that comes serves more texts"


def test_everything_fits_into_the_memory(demand: Demand) -> None:
    of = memory(0.5, kv=4_000_000)
    plan = planned(demand, costs(), of)
    for one in plan.tried:
        assert of.fixed + one.kv_tokens * of.per_cell + one.ram_budget <= of.limit
        assert one.kv_tokens >= one.n_sequences * WORK.tokens and one.kv_tokens % 256 == 0
        assert sum(SHAPE.slots(one.ram_budget)) == one.slots
    slots = [one.slots for one in plan.tried]
    assert slots == sorted(slots, reverse=True), "what texts take is taken from the slots"


def test_more_memory_never_gives_less(demand: Demand) -> None:
    rates = [planned(demand, costs(), memory(share)).best.tokens_per_s for share in (0.1, 0.25, 0.5, 0.75, 1.0)]
    assert rates == sorted(rates)


def test_a_faster_disk_never_gives_less(demand: Demand) -> None:
    rates = [
        planned(demand, costs(transfer_s=t * MS), memory(0.25)).best.tokens_per_s for t in (50.0, 10.0, 2.0, 0.5, 0.0)
    ]
    assert rates == sorted(rates)


def test_too_little_memory_is_said(demand: Demand) -> None:
    with pytest.raises(DoesNotFitError, match=r"a text of 64 tokens.* more than 30,100,000 bytes"):
        planned(demand, costs(), Memory(30_100_000, 30_000_000, 1000))
    few = planned(demand, costs(), memory(0.05, kv=500_000))
    assert few.tried[-1].n_sequences < 32, "more texts do not fit"


def test_slots_that_are_settled_stay(demand: Demand) -> None:
    of = replace(memory(0.0), slots=16_000_000)
    assert {one.ram_budget for one in planned(demand, costs(), of).tried} == {16_000_000}


def test_throughput_by_hand() -> None:
    # No prompts: n tokens a step.
    assert throughput(0.1, 0.5, 8, 64, Work(0, 100)) == pytest.approx(80)
    # A text alone: 64 tokens of a prompt in one step of 0.5 s, then 64 steps of 0.1 s.
    assert throughput(0.1, 0.5, 1, 64, Work(64, 64)) == pytest.approx(64 / (0.5 + 6.4))
    # Prompts without end: 32 tokens in a step make room for two of an answer.
    assert throughput(0.1, 0.5, 64, 32, Work(160, 10)) == pytest.approx(2 / 0.5)


def test_numbers_to_try() -> None:
    assert counts(1) == [1] and counts(10) == [1, 2, 3, 4, 5, 6, 7, 8, 10]
    tried = counts(64)
    assert tried[-1] == 64 and all(b - a <= max(1, a // 4) for a, b in pairwise(tried))


def test_prompts_are_computed_in_chunks_that_fit_a_micro_batch(demand: Demand) -> None:
    plan = planned(demand, costs(), memory(0.5), Work(2000, 32), most=2)
    assert 0 < plan.chosen.prompt_chunk + plan.n_sequences <= 512
