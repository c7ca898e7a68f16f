"""Looking ahead goes off where tokens take longer with it, and on again when that changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest

from pyengine.advice.trial import LookAheadTrial
from pyengine.native import NativeEngine
from pyengine.traces.routing_log import Prompt, RoutingLog, Token


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


def step(shares: tuple[int, ...], seconds: float) -> Prompt:
    """A computation of several texts, or of a prompt; who chose which expert is of no interest."""
    none = np.zeros(0, np.int64)
    several = shares if len(shares) > 1 else ()
    return Prompt(sum(shares), none, none.astype(np.uint16), none, several, seconds)


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
    run(lambda on: 0.01 + next(pauses), 800, trial, engine)
    assert trial.on


def test_what_changes_is_noticed(parts: tuple[LookAheadTrial, FakeEngine]) -> None:
    trial, engine = parts
    run(lambda on: 2.0 if on else 1.0, 300, trial, engine)
    assert not trial.on
    run(lambda on: 1.0 if on else 2.0, 3000, trial, engine)
    assert trial.on


@pytest.mark.parametrize(("seconds", "first"), [(0.01, 48), (1.0, 8)])
def test_slow_tokens_are_tried_sooner(seconds: float, first: int, parts: tuple[LookAheadTrial, FakeEngine]) -> None:
    trial, engine = parts
    was = run(lambda on: (2 if on else 1) * seconds, 300, trial, engine)
    assert was.index(False) == first + 4, "the first turn looks ahead as before"
    assert was[first : first + 32].count(False) == 16 and not any(was[first + 32 : first + 32 + 200])


def test_steps_of_several_texts_are_tried_too(parts: tuple[LookAheadTrial, FakeEngine]) -> None:
    """Chunks of prompts among them, of which each takes as long as it likes, decide nothing."""
    trial, engine = parts
    random = np.random.default_rng(5)
    for i in range(300):
        trial.prompt(step((1,) * 8, 0.11 if engine.on else 0.10))
        if i % 3 == 0:
            trial.prompt(step((1, 1, 1, 1, 1, 1, 1, 100), random.random()))
            trial.prompt(step((8,), random.random()))
    assert not trial.on and not engine.on


def test_only_steps_of_like_size_are_compared(parts: tuple[LookAheadTrial, FakeEngine]) -> None:
    """The larger ones come without, and would make looking ahead seem the faster way."""
    trial, engine = parts
    for _ in range(300):
        trial.prompt(step((1,) * 8, 0.11 if engine.on else 0.10))
        if not engine.on:
            trial.prompt(step((1,) * 16, 0.5))
    assert not trial.on


def test_another_size_is_tried_anew(parts: tuple[LookAheadTrial, FakeEngine]) -> None:
    trial, engine = parts
    run(lambda on: 0.01 if on else 0.02, 2000, trial, engine)
    assert trial.on
    for _ in range(60):  # far from the next trial of single tokens
        trial.prompt(step((1,) * 8, 0.11 if engine.on else 0.10))
    assert not trial.on and not engine.on
    for _ in range(5):
        run(lambda on: 0.01 if on else 0.02, 12, trial, engine)
        trial.prompt(step((1,) * 8, 0.11 if engine.on else 0.10))
    assert not trial.on, "a few tokens alone are no change"
    run(lambda on: 0.01 if on else 0.02, 60, trial, engine)
    assert trial.on and engine.on
