"""Which policy is chosen, and that a change needs a reason."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np

from pyengine.advice.judging import CLEARLY, Cost, Question, choose, judge, unpack

N_EXPERT, SLOTS = 16, 8


def loyal(n_token: int = 512) -> np.ndarray[tuple[int, int, int], np.dtype[np.uint16]]:
    """One layer: every second token uses one of six experts, the others ever new ones. LFU keeps the six; LRU, with
    slots for eight tokens' experts, loses most of them before they come again."""
    rng = np.random.default_rng(1)
    ids = np.empty((n_token, 1, 1), np.uint16)
    ids[0::2, 0, 0] = rng.integers(0, 6, n_token // 2)
    ids[1::2, 0, 0] = 6 + np.arange(n_token // 2) % 10
    return ids


def test_frequency_is_chosen_where_it_must_be() -> None:
    question = Question(loyal(), N_EXPERT, SLOTS, "lru", 0.01)
    costs = judge(unpack(question.pack()))
    assert all(a < 0.9 * b for a, b in zip(costs["lrfu"].missing, costs["lru"].missing, strict=True))
    assert choose("lru", {name: costs[name] for name in ("lru", "lrfu")}, 0.01) == "lrfu"
    assert choose("lrfu", {name: costs[name] for name in ("lru", "lrfu")}, 0.01) == "lrfu"


def test_the_program_answers_as_its_functions_do() -> None:
    question = Question(loyal(), N_EXPERT, SLOTS, "lru", 0.01)
    done = subprocess.run(
        [sys.executable, "-m", "pyengine.advice.judging"], input=question.pack(), capture_output=True, timeout=120
    )
    answer = json.loads(done.stdout)
    assert answer["policy"] in ("lrfu", "expert-map") and not done.stderr
    expected = judge(question)
    assert {n: c["missing"] for n, c in answer["costs"].items()} == {n: list(c.missing) for n, c in expected.items()}


def test_misses_are_those_of_the_two_halves_after_the_warm_up() -> None:
    ids = np.zeros((16, 1, 1), np.uint16)
    ids[:4, 0, 0] = [0, 1, 2, 3]  # the warm-up: nothing counts
    ids[4:10, 0, 0] = [4, 4, 5, 5, 5, 5]
    ids[10:, 0, 0] = [5, 6, 6, 6, 6, 6]
    costs = judge(Question(ids, N_EXPERT, 4, "lru", 0.0))
    assert costs["lru"].missing == (2 / 6, 1 / 6)


def test_a_tie_and_what_is_hardly_better_change_nothing() -> None:
    now = Cost((10.0, 10.0), 1e-5)
    assert choose("lfu", {"lfu": now, "lru": now}, 1.0) == "lfu"
    hardly = Cost((10.0 * (1 - CLEARLY / 2),) * 2, 1e-5)
    assert choose("lfu", {"lfu": now, "lru": hardly}, 1.0) == "lfu"
    once = Cost((2.0, 9.9), 1e-5)
    assert choose("lfu", {"lfu": now, "lru": once}, 1.0) == "lfu", "better in one half only"
    clearly = Cost((9.0, 9.0), 1e-5)
    assert choose("lfu", {"lfu": now, "lru": clearly}, 1.0) == "lru"
    assert choose("lfu", {"lfu": now, "lru": clearly, "mrs": Cost((8.0, 8.0), 1e-5)}, 1.0) == "mrs"


def test_a_policy_that_takes_more_time_than_its_hits_save_is_not_chosen() -> None:
    costs = {"lfu": Cost((10.0, 10.0), 1e-5), "expert-map": Cost((9.0, 9.0), 3e-4)}
    assert choose("lfu", costs, 1e-4) == "lfu"
    assert choose("lfu", costs, 1e-3) == "expert-map"


def test_nothing_missing_is_good_enough() -> None:
    costs = {"lfu": Cost((0.0, 0.0), 1e-4), "lru": Cost((0.0, 0.0), 0.0)}
    assert choose("lfu", costs, 1e-3) == "lfu"
