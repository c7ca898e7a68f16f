"""Steps of a GPU whose experts come over a link."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from made_up_costs import MS, costs, demand, shape

from pyengine.planner.costs import Costs
from pyengine.planner.demand import Demand
from pyengine.planner.gpu_measuring import stream_tokens
from pyengine.planner.inequalities import StepShape
from pyengine.planner.refine import Refiner, StepRecord
from pyengine.planner.solving import Memory, Work, solve
from pyengine.planner.step_times import inequalities, step_time
from pyengine.planning.routing import uniform_routing


def on_gpu(**changed: object) -> Costs:
    """A layer takes 1.1 ms without its experts for one token, an expert 1 ms with one row, moving one 2 ms."""
    return costs(**({"device": "GPU", "stream_tokens": 100, "latency_s": 0.0} | changed))


def test_what_the_router_asks_for_is_waited_for_by_the_whole_layer() -> None:
    few = StepShape(1, 1, 0, 16)
    found = step_time(on_gpu(), few, demand(hot=3, hot_rows=3, cold=2, cold_rows=2))
    assert found.waiting == pytest.approx(10 * 2 * 2 * MS)
    assert found.total == pytest.approx(10 * (1.1 + 5 * 1 + 2 * 2) * MS)
    assert found.reading == pytest.approx(found.waiting)
    on_cpu = step_time(on_gpu(device=""), few, demand(hot=3, hot_rows=3, cold=2, cold_rows=2))
    assert on_cpu.waiting < found.waiting, "there kernels of those that are here hide it"


def test_from_so_many_tokens_on_moving_hides_behind_the_layer_before() -> None:
    many, load = StepShape(101, 1, 0, 16), demand(hot=0, hot_rows=0, cold=8, cold_rows=202)
    slow = step_time(on_gpu(stream_tokens=102), many, load)
    streamed = step_time(on_gpu(stream_tokens=101), many, load)
    assert slow.waiting == pytest.approx(10 * 8 * 2 * MS)
    assert streamed.waiting == 0, "11 ms of the layer and 27 ms of its kernels are longer than 16 ms of moving"
    slower = step_time(on_gpu(stream_tokens=101, transfer_s=20 * MS), many, load)
    computing = (slower.attention + slower.experts) / 10
    assert slower.waiting / 10 == pytest.approx(8 * 20 * MS - computing)
    assert [one.holds for one in inequalities(on_gpu(stream_tokens=101), many, load)] == [True, True, True]
    assert not all(one.holds for one in inequalities(on_gpu(stream_tokens=102), many, load))


def test_nothing_missing_needs_no_link() -> None:
    load = demand(hot=4, hot_rows=4, cold=0, cold_rows=0)
    at_once = on_gpu(transfer_s=1e9, latency_s=1.0)
    assert step_time(at_once, StepShape(1, 1, 0, 16), load).waiting == 0
    assert all(one.holds for one in inequalities(at_once, StepShape(1, 1, 0, 16), load))


def test_the_slower_of_link_and_disk_sets_the_pace() -> None:
    given = on_gpu(disk_s=10 * MS, ram_share=0.9)
    assert given.pace_s == pytest.approx(2 * MS)
    assert replace(given, ram_share=0.5).pace_s == pytest.approx(5 * MS)
    assert given.sound and not replace(given, ram_share=1.5).sound


@pytest.mark.parametrize(("n_expert", "n_used", "tokens"), [(32, 4, 32), (128, 8, 64), (8, 2, 16), (60, 7, 35)])
def test_streaming_begins_where_the_engine_begins_it(n_expert: int, n_used: int, tokens: int) -> None:
    assert stream_tokens(n_expert, n_used) == tokens
    assert tokens * n_used >= 4 * n_expert > (tokens - 1) * n_used


@pytest.mark.parametrize("factors", [{"compute": 2.0, "other": 2.0}, {"transfer": 3.0}, {"misses": 0.7}])
def test_steps_correct_what_was_measured(factors: dict[str, float]) -> None:
    known, slots = Demand(uniform_routing(4, 8, 2), [range(4)]), [16]
    measured = on_gpu(transfer_s=4 * MS)
    truth = measured.scaled(**factors)
    refiner = Refiner(measured, known, lambda: slots)
    random = np.random.default_rng(1)
    for step in range(40):
        n = (4, 8)[step % 2]
        load = known.of(n, 0, slots)
        found = step_time(truth, StepShape(n, n, 50.0 * n, 16), load)
        missing = round(load.missing * 4 * truth.miss_factor)
        noise = float(random.uniform(0.98, 1.02))
        times = (found.total * noise, 0.0, found.waiting * noise, found.reading * noise)
        refiner.observe(StepRecord(n, 0, 50.0 * n, *times, round(load.wanted * 4), missing, missing))
    load, step = known.of(6, 0, slots), StepShape(6, 6, 300.0, 16)
    wrong, right = (step_time(one, step, load).total for one in (measured, truth))
    assert abs(step_time(refiner.costs, step, load).total / right - 1) < 0.05 < abs(wrong / right - 1)


def test_a_slower_link_takes_more_texts_at_once() -> None:
    known, kind = Demand(uniform_routing(4, 8, 2), [range(4)]), shape()
    memory, work = Memory(40_000_000, 20_000_000, 1000), Work(8, 64)
    fast, slow = (
        solve(on_gpu(transfer_s=s, stream_tokens=16), known, kind, memory, work, most_sequences=32)
        for s in (0.05 * MS, 20 * MS)
    )
    assert slow.n_sequences > fast.n_sequences
    assert slow.best.tokens_per_s < fast.best.tokens_per_s
