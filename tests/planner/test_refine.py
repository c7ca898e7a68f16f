"""Costs that are wrong, corrected by the steps of an engine that is simulated with the true ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from made_up_costs import costs, shape

from pyengine.planner.costs import Costs
from pyengine.planner.demand import Demand
from pyengine.planner.inequalities import StepShape, step_time
from pyengine.planner.refine import Refiner, StepRecord
from pyengine.planner.solving import Memory, Work, solve
from pyengine.planning.routing import uniform_routing

SLOTS = [16]


@pytest.fixture(scope="module")
def demand() -> Demand:
    return Demand(uniform_routing(4, 8, 2), [range(4)])


def simulated(truth: Costs, demand: Demand, n: int, noise: float = 1.0, chunk: int = 0) -> StepRecord:
    """A step of n texts as an engine with these costs would count it."""
    load = demand.of(n, chunk, SLOTS)
    found = step_time(truth, StepShape(n + chunk, n + bool(chunk), 50.0 * n, 16), load)
    missing = round(load.missing * 4 * truth.miss_factor)
    return StepRecord(
        sequences=n,
        chunk=chunk,
        cells=50.0 * n,
        wall_s=found.total * noise,
        compute_s=found.experts * noise,
        stall_s=found.waiting * noise,
        io_s=found.reading * noise,
        wanted=round(load.wanted * 4),
        missing=missing,
        loaded=missing,
    )


def refined(measured: Costs, truth: Costs, demand: Demand, sizes: tuple[int, ...] = (4, 8), steps: int = 40) -> Refiner:
    refiner = Refiner(measured, demand, lambda: SLOTS)
    random = np.random.default_rng(1)
    for step in range(steps):
        refiner.observe(simulated(truth, demand, sizes[step % len(sizes)], float(random.uniform(0.95, 1.05))))
    return refiner


@pytest.mark.parametrize(
    "factors",
    [
        {"compute": 2.0},
        {"other": 0.5},
        {"transfer": 3.0},
        {"misses": 0.7},
        {"compute": 1.4, "other": 1.3, "transfer": 0.4},
    ],
)
def test_the_true_costs_are_found(factors: dict[str, float], demand: Demand) -> None:
    truth = costs().scaled(**factors)
    refiner = refined(costs(), truth, demand)
    for name, factor in refiner.factors.items():
        assert factor == pytest.approx(factors.get(name, 1.0), rel=0.12), name
    for n in (2, 4, 8, 16):  # also for numbers of texts that were never run
        shape_ = StepShape(n, n, 50.0 * n, 16)
        load = demand.of(n, 0, SLOTS)
        actual = step_time(truth, shape_, load).total
        assert step_time(refiner.costs, shape_, load).total == pytest.approx(actual, rel=0.1)


def test_outliers_do_not_count(demand: Demand) -> None:
    refiner = refined(costs(), costs().scaled(compute=1.5), demand)
    before = refiner.costs
    for _ in range(10):
        refiner.observe(simulated(costs(), demand, 4, noise=9.0))  # a neighbour took the processor
    assert refiner.costs.expert_s(1) == pytest.approx(before.expert_s(1), rel=0.08)


def test_a_machine_that_changes_is_followed(demand: Demand) -> None:
    refiner = refined(costs(), costs(), demand)
    for _ in range(64):
        refiner.observe(simulated(costs().scaled(transfer=4.0), demand, 4))
    assert refiner.factors["transfer"] == pytest.approx(4.0, rel=0.1)


def test_few_steps_change_nothing(demand: Demand) -> None:
    refiner = refined(costs(), costs().scaled(compute=2.0), demand, steps=3)
    assert refiner.costs == costs()
    assert refiner.actual_step_s(4) is None and refiner.commonest() is None


def test_what_cannot_be_is_ignored(demand: Demand) -> None:
    refiner = refined(costs(), costs(), demand)
    good = simulated(costs(), demand, 4)
    for wrong in (
        replace(good, wall_s=0.0),
        replace(good, sequences=0),
        replace(good, compute_s=-1.0, io_s=-1.0, wall_s=1e-9),
        replace(good, compute_s=1e6, wall_s=2e6),
    ):
        for _ in range(100):
            refiner.observe(wrong)
    assert refiner.factors["compute"] == pytest.approx(1.0, rel=0.1)
    assert refiner.costs.sound


def test_actual_times_are_medians_by_kind(demand: Demand) -> None:
    refiner = refined(costs(), costs(), demand, sizes=(4, 4, 8))
    alone = step_time(costs(), StepShape(4, 4, 200, 16), demand.of(4, 0, SLOTS)).total
    assert refiner.actual_step_s(4) == pytest.approx(alone, rel=0.05)
    assert refiner.actual_step_s(4, chunk=64) is None
    found = refiner.commonest()
    assert found is not None and found[0] == 4


def test_a_corrected_plan_chooses_as_if_the_truth_had_been_measured(demand: Demand) -> None:
    truth = costs(transfer_s=0.02)
    refiner = refined(costs(), truth, demand, steps=64)
    memory, work = Memory(60_000_000, 30_000_000, 1000), Work(32, 32)
    plans = [
        solve(given, demand, shape(), memory, work, most_sequences=24) for given in (refiner.costs, truth, costs())
    ]
    corrected, right, wrong = plans
    as_chosen = next(one for one in right.tried if one.n_sequences == corrected.n_sequences)
    assert as_chosen.tokens_per_s >= 0.9 * right.best.tokens_per_s
    assert corrected.best.tokens_per_s == pytest.approx(right.best.tokens_per_s, rel=0.12)
    assert wrong.best.tokens_per_s > 1.3 * right.best.tokens_per_s


def test_waiting_that_the_rest_does_not_explain_is_learned(demand: Demand) -> None:
    # As measured, experts come together and 5 ms of kernels are left; in fact they come evenly. And the other way.
    lumps = costs(rest=((1, 0.005), (64, 0.005)))
    sparse = costs()
    for measured, truth in ((lumps, sparse), (sparse.scaled(), lumps)):
        refiner = refined(measured, truth, demand)
        found, right, before = (
            step_time(given, StepShape(8, 8, 400.0, 16), demand.of(8, 0, SLOTS)).total
            for given in (refiner.costs, truth, measured)
        )
        if measured is lumps:
            assert found == pytest.approx(right, rel=0.05) and before > 1.1 * right
            assert refiner.factors["rest"] < 0.5
        else:
            assert refiner.factors["rest"] == 1.0, "nothing that was measured can be made longer"
