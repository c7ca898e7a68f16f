"""How far a predictor's ranks and scores can be trusted, and how many experts it should name.

Fate names, beyond the k experts with the highest scores, those more confident than the 75th percentile of all
predictions, as many as can arrive in time (arXiv 2502.12224): uncertain tokens get more guesses than certain ones.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pyengine.predictors.predictor import Calibration
from pyengine.predictors.recall import Flags, Ids, Scores, chosen, ranking

#: Of all predictions, the share that is not confident.
PERCENTILE = 75.0

_NEWTON_STEPS = 25


def calibrate(scores: Scores, ids: Ids, resident: Flags, percentile: float = PERCENTILE) -> Calibration:
    """Measure on tokens that the predictor was not fitted to.

    Args:
        scores: float32 [n, n_expert].
        ids: [n, k], experts used.
        resident: bool [n, n_expert], for by_rank_absent.
        percentile: of confidence, above which `named` adds an expert.
    """
    used = chosen(ids, scores.shape[1])
    order = ranking(scores)
    right = np.take_along_axis(used, order, axis=1)
    absent = ~np.take_along_axis(resident, order, axis=1)
    by_rank = falling(right.mean(axis=0), np.full(right.shape[1], float(len(right))))
    seen = absent.sum(axis=0).astype(np.float64)
    # One imagined expert at each rank, as good as the rank is at large, stands in for those never seen absent.
    by_rank_absent = falling(((right & absent).sum(axis=0) + by_rank) / (seen + 1), seen + 1)
    margins = margin(scores, ids.shape[1])
    slope, intercept = _logistic(margins.ravel(), used.ravel())
    confidence = _sigmoid(slope * margins + intercept)
    threshold = float(np.percentile(confidence, percentile))
    return Calibration(by_rank.astype(np.float32), by_rank_absent.astype(np.float32), slope, intercept, threshold)


def margin(scores: Scores, k: int) -> npt.NDArray[np.float64]:
    """float64 [n, n_expert]: scores less the middle between the k-th and the (k+1)-th highest of their token."""
    values = np.asarray(scores, np.float64)
    if k >= values.shape[1]:
        return np.asarray(values - values.min(axis=1, keepdims=True))
    parted = -np.partition(-values, (k - 1, k), axis=1)
    return np.asarray(values - parted[:, k - 1 : k + 1].mean(axis=1, keepdims=True))


def confidence(scores: Scores, k: int, calibration: Calibration) -> npt.NDArray[np.float64]:
    """float64 [n, n_expert]: probability that each expert is used."""
    return _sigmoid(calibration.slope * margin(scores, k) + calibration.intercept)


def named(scores: Scores, k: int, calibration: Calibration, most: int) -> Flags:
    """The experts to fetch: the k with the highest scores, and those beyond whose confidence exceeds the threshold.

    Args:
        scores: float32 [n, n_expert].
        k: experts that a token uses.
        calibration: of the predictor.
        most: named in all, from measurement: what arrives while the layers between are computed.

    Returns:
        bool [n, n_expert].
    """
    order = ranking(scores)
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(order.shape[1]), order.shape), axis=1)
    sure = confidence(scores, k, calibration) > calibration.threshold
    return np.asarray(((rank < k) | sure) & (rank < most))


def worthwhile(calibration: Calibration, least_chance: float, most: int) -> int:
    """How many ranks an absent expert is worth fetching at: those with a chance of at least `least_chance`."""
    return min(most, int((calibration.by_rank_absent >= least_chance).sum()))


def falling(values: npt.NDArray[np.float64], weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The never ascending sequence nearest to `values` in weighted squares (pooling of adjacent violators)."""
    blocks: list[tuple[float, float, int]] = []
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        mean, total, n = value, weight, 1
        while blocks and blocks[-1][0] < mean:
            before, its, count = blocks.pop()
            mean = (mean * total + before * its) / (total + its)
            total, n = total + its, n + count
        blocks.append((mean, total, n))
    return np.concatenate([np.full(n, mean) for mean, _, n in blocks])


def _logistic(x: npt.NDArray[np.float64], y: Flags) -> tuple[float, float]:
    """(slope, intercept) of the logistic regression of y on x, by Newton's method with a little shrinkage."""
    scale = float(np.std(x)) or 1.0
    x = x / scale
    at = np.zeros(2)
    for _ in range(_NEWTON_STEPS):
        p = _sigmoid(at[0] * x + at[1])
        w = p * (1 - p)
        gradient = np.array([((y - p) * x).sum(), (y - p).sum()]) - at
        cross = (w * x).sum()
        change = np.linalg.solve(np.array([[(w * x * x).sum() + 1, cross], [cross, w.sum() + 1]]), gradient)
        at += np.clip(change, -2.0, 2.0)
        if np.abs(change).max() < 1e-6:
            break
    return float(at[0]) / scale, float(at[1])


def _sigmoid(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(x, -60.0, 60.0))))
