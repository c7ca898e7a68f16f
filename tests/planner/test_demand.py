"""Distinct and missing experts of steps of many texts: against the formula, the limits, and what grows with what."""

from __future__ import annotations

import numpy as np
import pytest

from pyengine.planner.demand import Demand, expected_distinct
from pyengine.planning.routing import Routing, uniform_routing
from pyengine.traces import Prompts

LAYERS = [range(4)]


@pytest.fixture(scope="module")
def uniform() -> Demand:
    return Demand(uniform_routing(4, 16, 4), LAYERS)


def test_balanced_routing_needs_what_the_formula_says(uniform: Demand) -> None:
    for n in (1, 2, 4, 8, 16):
        assert uniform.of(n, 0, [64]).wanted == pytest.approx(expected_distinct(16, 4, n), rel=0.06)
    assert uniform.of(4, 12, [64]).wanted == pytest.approx(expected_distinct(16, 4, 16), rel=0.06)
    assert expected_distinct(16, 4, 1) == pytest.approx(4) and expected_distinct(16, 4, 1000) == pytest.approx(16)


def test_everything_resident_misses_nothing(uniform: Demand) -> None:
    found = uniform.of(4, 8, [64])
    assert found.missing == 0 and found.cold_rows.sum() == 0
    assert (found.hot_rows == 12 * 4).all()


def test_one_slot_holds_next_to_nothing(uniform: Demand) -> None:
    found = uniform.of(4, 0, [1])
    assert found.missing >= found.wanted - 1
    assert ((found.hot_rows + found.cold_rows) == 16).all()


def test_more_slots_miss_less_and_more_texts_more(uniform: Demand) -> None:
    by_slots = [uniform.of(4, 0, [n]).missing for n in (8, 16, 32, 48, 64)]
    assert by_slots == sorted(by_slots, reverse=True)
    by_texts = [uniform.of(n, 0, [32]).missing for n in (1, 2, 4, 8)]
    assert by_texts == sorted(by_texts)


def test_with_balanced_routing_no_policy_misses_less_than_the_share_without_slots() -> None:
    routing = uniform_routing(4, 16, 4)
    shares = {}
    for policy in ("lru", "lfu"):
        found = Demand(routing, LAYERS, policy).of(16, 0, [32])
        shares[policy] = found.missing / found.wanted
    assert 0.45 < shares["lfu"] < shares["lru"]
    assert shares["lru"] > 0.95, "layer after layer wants all its experts: the oldest are the next ones"


def test_texts_that_stay_with_their_experts_find_them_again() -> None:
    """One token after the other uses the same experts: a text alone misses nothing, many miss what does not fit."""
    ids = np.repeat(np.arange(64) // 16 % 4, 4).reshape(64, 1, 4) * 4 + np.arange(4)
    routing = Routing(np.repeat(ids, 4, axis=1).astype(np.uint16), 16, True, Prompts())
    demand = Demand(routing, LAYERS, "lru")
    alone, together = demand.of(1, 0, [24]), demand.of(8, 0, [24])
    assert alone.missing < 0.1 * alone.wanted
    assert together.missing > 4


def test_shape_classes_have_slots_of_their_own() -> None:
    demand = Demand(uniform_routing(4, 16, 4), [(0, 2), (1, 3)])
    found = demand.of(4, 0, [32, 1])
    by_layer = found.cold.reshape(-1, 4).mean(axis=0)
    assert by_layer[[0, 2]].max() == 0 and by_layer[[1, 3]].min() > 8


def test_the_same_question_has_the_same_answer(uniform: Demand) -> None:
    other = Demand(uniform_routing(4, 16, 4), LAYERS)
    assert (other.of(3, 5, [20]).cold == uniform.of(3, 5, [20]).cold).all()
