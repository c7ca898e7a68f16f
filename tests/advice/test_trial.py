"""Looking ahead goes off where tokens take longer with it, and on again when that changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest

from pyengine.advice.trial import LookAheadTrial
from pyengine.native import NativeEngine
from pyengine.traces.routing_log import RoutingLog, Token


class FakeEngine:
    def __init__(self) -> None:
        self.on = True

    def set_look_ahead(self, on: bool) -> None:
        self.on = on


class FakeLog:
    def listen(self, listener: Any) -> None:
        self.listener = listener


def run(seconds: Callable[[bool], float], n: int, trial: LookAheadTrial, engine: FakeEngine) -> list[bool]:
    """`n` tokens that take so long with and without looking ahead; which it was for each."""
    was = []
    ids, weights, inputs = np.zeros((1, 1), np.uint16), np.zeros((1, 1), np.float16), np.zeros((1, 0), np.float16)
    for _ in range(n):
        was.append(engine.on)
        took = seconds(engine.on)
        trial.token(Token(ids, weights, inputs, took))
    return was


@pytest.fixture
def parts() -> tuple[LookAheadTrial, FakeEngine]:
    engine = FakeEngine()
    return LookAheadTrial(cast(NativeEngine, engine), cast(RoutingLog, FakeLog())), engine


@pytest.mark.parametrize(("with_it", "without", "stays"), [(1.0, 1.5, True), (1.5, 1.0, False), (1.0, 0.99, True)])
def test_the_faster_way_stays(
    with_it: float, without: float, stays: bool, parts: tuple[LookAheadTrial, FakeEngine]
) -> None:
    trial, engine = parts
    noise = np.random.default_rng(3)
    was = run(lambda on: (with_it if on else without) * (1 + 0.002 * noise.random()), 6000, trial, engine)
    assert trial.on == stays
    assert np.mean(np.array(was[200:]) == stays) > 0.95, "trials are rare"


def test_a_pause_of_the_user_decides_nothing(parts: tuple[LookAheadTrial, FakeEngine]) -> None:
    trial, engine = parts
    pauses = iter([0.0] * 50 + [100.0, *[0.0] * 9] * 100)
    run(lambda on: 1.0 + next(pauses), 800, trial, engine)
    assert trial.on


def test_what_changes_is_noticed(parts: tuple[LookAheadTrial, FakeEngine]) -> None:
    trial, engine = parts
    run(lambda on: 2.0 if on else 1.0, 300, trial, engine)
    assert not trial.on
    run(lambda on: 1.0 if on else 2.0, 3000, trial, engine)
    assert trial.on
