"""The figures, against cases worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pyengine.predictors.recall import (
    exact_set,
    good_pred,
    lru_residents,
    miss_precision,
    miss_recall,
    ranking,
    recall,
    right_by_rank,
)

SCORES = np.array([[0.9, 0.1, 0.8, 0.2, 0.3], [0.1, 0.2, 0.3, 0.4, 0.5]], np.float32)
"""orders 0 2 4 3 1 and 4 3 2 1 0"""
IDS = np.array([[0, 3], [3, 4]], np.uint16)


def test_ranking_breaks_ties_by_id_and_puts_nan_last() -> None:
    scores = np.array([[1.0, np.nan, 2.0, 1.0]], np.float32)
    assert ranking(scores).tolist() == [[2, 0, 3, 1]]


def test_right_by_rank() -> None:
    assert right_by_rank(SCORES, IDS).astype(int).tolist() == [[1, 0, 0, 1, 0], [1, 1, 0, 0, 0]]


@pytest.mark.parametrize(("named", "share"), [(0, 0.0), (1, 0.5), (2, 0.75), (3, 0.75), (4, 1.0), (9, 1.0)])
def test_recall(named: int, share: float) -> None:
    assert recall(SCORES, IDS, named) == share


def test_exact_set() -> None:
    assert exact_set(SCORES, IDS) == 0.5


def test_figures_of_nothing_are_nan() -> None:
    none, ids = np.zeros((0, 5), np.float32), np.zeros((0, 2), np.uint16)
    assert math.isnan(recall(none, ids, 2)) and math.isnan(exact_set(none, ids))
    everything = np.ones((2, 5), bool)
    assert math.isnan(miss_recall(SCORES, IDS, everything, 2))
    assert math.isnan(miss_precision(SCORES, IDS, everything, 2))


def test_miss_stream() -> None:
    resident = np.zeros((2, 5), bool)
    resident[0, [0, 2]] = True  # token 0 misses expert 3 alone
    resident[1, 4] = True  # token 1 misses expert 3 alone
    assert miss_recall(SCORES, IDS, resident, 2) == 0.5  # named: 0 2, of which 3 is none; 4 3, of which 3 is
    assert miss_recall(SCORES, IDS, resident, 4) == 1.0
    # Absent among the first three: of token 0 expert 4, wrong; of token 1 experts 3, right, and 2, wrong.
    assert miss_precision(SCORES, IDS, resident, 3) == pytest.approx(1 / 3)


def test_good_pred_both_ways() -> None:
    predicted = np.array([[1, 1, 0, 0], [0, 1, 1, 0]], bool)
    used = np.array([[1, 0, 1, 0], [0, 1, 1, 0]], bool)
    in_time = np.array([[1, 1, 1, 0], [0, 0, 1, 0]], bool)
    found = good_pred(predicted, used, in_time)
    assert (found.accuracy, found.fetch_rate, found.right_in_time) == (0.75, 0.75, 0.5)
    assert found.product == 0.75 * 0.75  # the product flatters: right and in time is one half


def test_lru_holds_what_a_small_cache_would() -> None:
    # Two layers of three experts; layer 1's are 3, 4, 5 in the cache. Three slots.
    ids = np.array([[[0], [1]], [[1], [1]], [[0], [2]], [[2], [1]]], np.uint16)
    held = [sorted(np.flatnonzero(row).tolist()) for row in lru_residents(ids, 3, 3).reshape(4, 6)]
    # Each row joins two moments: layer 0 before its look-up and layer 1 before its own.
    # 0, 4 | 1, 4(hit) | 0(hit), 5 evicts 1 ... by order of use.
    assert held == [[], [0, 4], [0, 1, 4], [0, 5]]


def test_lru_never_evicts_a_member_of_the_set_it_serves() -> None:
    ids = np.array([[[0, 1]], [[2, 0]], [[3, 1]], [[0, 1]]], np.uint16)
    held = [sorted(np.flatnonzero(row).tolist()) for row in lru_residents(ids, 4, 2)[:, 0]]
    assert held == [[], [0, 1], [0, 2], [1, 3]]
