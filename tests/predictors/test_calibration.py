"""Chances by rank and by margin, and how many experts are named."""

from __future__ import annotations

import numpy as np
import pytest

from pyengine.predictors.calibration import calibrate, confidence, falling, margin, named, worthwhile
from pyengine.predictors.predictor import Calibration
from pyengine.predictors.recall import chosen

N, N_EXPERT, K = 4000, 12, 3


def noisy(noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(scores, ids): a prediction and the truth, which differ by noise."""
    random = np.random.default_rng(seed)
    scores = random.standard_normal((N, N_EXPERT)).astype(np.float32)
    truth = scores + noise * random.standard_normal(scores.shape)
    return scores, np.argsort(-truth, axis=1)[:, :K].astype(np.uint16)


def test_falling_pools_what_ascends() -> None:
    assert falling(np.array([3.0, 1.0, 2.0, 0.0]), np.ones(4)).tolist() == [3.0, 1.5, 1.5, 0.0]
    assert falling(np.array([0.0, 3.0]), np.array([3.0, 1.0])).tolist() == [0.75, 0.75]


def test_chances_by_rank_are_those_that_are_met() -> None:
    scores, ids = noisy(0.5)
    found = calibrate(scores, ids, np.zeros((N, N_EXPERT), bool))
    assert found.by_rank.sum() == pytest.approx(K, abs=1e-3)
    assert (np.diff(found.by_rank) <= 0).all() and found.by_rank[0] > 0.9 > 0.1 > found.by_rank[-1]
    fresh_scores, fresh_ids = noisy(0.5, seed=1)
    order = np.argsort(-fresh_scores, axis=1)
    met = np.take_along_axis(chosen(fresh_ids, N_EXPERT), order, axis=1).mean(axis=0)
    np.testing.assert_allclose(found.by_rank, met, atol=0.04)
    np.testing.assert_allclose(found.by_rank_absent, found.by_rank, atol=1e-3)


def test_absent_experts_have_chances_of_their_own() -> None:
    scores, ids = noisy(0.5)
    used = chosen(ids, N_EXPERT)
    half = np.random.default_rng(3).random(used.shape) < 0.5
    found = calibrate(scores, ids, used & half)  # half of what is used is there already, nothing else is
    assert found.by_rank_absent[0] < found.by_rank[0] and found.by_rank_absent[K] < found.by_rank[K]
    everything = calibrate(scores, ids, np.ones_like(used))
    np.testing.assert_allclose(everything.by_rank_absent, everything.by_rank, atol=1e-6)


def test_confidence_is_a_probability() -> None:
    scores, ids = noisy(0.8)
    found = calibrate(scores, ids, np.zeros((N, N_EXPERT), bool))
    sure = confidence(scores, K, found)
    used = chosen(ids, N_EXPERT)
    for low in (0.0, 0.25, 0.5, 0.75):
        inside = (sure >= low) & (sure < low + 0.25)
        assert used[inside].mean() == pytest.approx(sure[inside].mean(), abs=0.06)
    assert (sure > found.threshold).mean() == pytest.approx(0.25, abs=0.01)


def test_a_margin_is_zero_between_k_and_the_next() -> None:
    values = margin(np.array([[4.0, 1.0, 2.0, 3.0]], np.float32), 2)
    assert values.tolist() == [[1.5, -1.5, -0.5, 0.5]]
    assert margin(np.array([[2.0, 5.0]], np.float32), 2).tolist() == [[0.0, 3.0]]


def test_uncertain_tokens_get_more_guesses() -> None:
    chance = np.linspace(1, 0, 4).astype(np.float32)
    c = Calibration(chance, chance, slope=1.0, intercept=0.0, threshold=0.4)
    scores = np.array([[9.0, 0.0, -9.0, -9.0], [0.3, 0.2, 0.1, 0.0]], np.float32)
    assert named(scores, 1, c, most=4).tolist() == [[True, False, False, False], [True, True, True, True]]
    assert named(scores, 1, c, most=2).tolist() == [[True, False, False, False], [True, True, False, False]]
    assert [worthwhile(c, least, 3) for least in (0.0, 0.5, 0.9, 1.1)] == [3, 2, 1, 0]


def test_perfect_and_hopeless_predictions_calibrate() -> None:
    scores, ids = noisy(0.0)
    perfect = calibrate(scores, ids, np.zeros((N, N_EXPERT), bool))
    assert perfect.by_rank.tolist() == [1.0] * K + [0.0] * (N_EXPERT - K) and np.isfinite(perfect.slope)
    flat = calibrate(np.zeros_like(scores), ids, np.zeros((N, N_EXPERT), bool))
    assert np.isfinite([flat.slope, flat.intercept, flat.threshold]).all()
