"""Offsets for routers that do not choose by their scores alone.

DeepSeek and its kin choose by sigmoid(score) plus a bias (blk.N.exp_probs_b) that levels the experts' load, some within
groups. No matrix can say that, but an offset per expert comes near: the one with which each expert is named as often as
it was used.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pyengine.predictors.recall import chosen, recall

Floats = npt.NDArray[np.float32]

_ROUNDS = 60


def matched(scores: Floats, ids: npt.NDArray[np.uint16]) -> Floats:
    """float32 [n_expert]: to add to scores [n, n_expert] so that each expert is among the k highest as often as it is
    in ids [n, k]; zero if that recalls no better."""
    k = ids.shape[1]
    wanted = chosen(ids, scores.shape[1]).mean(axis=0)
    offset = np.zeros(scores.shape[1], np.float64)
    best, best_recall = offset.copy(), recall(scores, ids, k)
    step = float(scores.std()) or 1.0
    for i in range(_ROUNDS):
        moved = np.asarray(scores + offset, np.float32)
        top = np.argpartition(-moved, k - 1, axis=1)[:, :k] if k < moved.shape[1] else ids
        named = chosen(top.astype(np.uint16), scores.shape[1]).mean(axis=0)
        # Logarithms: an expert that is never named although it is used must move far.
        offset += step * 0.5 * 0.97**i * np.log((wanted + 1e-3) / (named + 1e-3))
        found = recall(np.asarray(scores + offset, np.float32), ids, k)
        if found > best_recall:
            best, best_recall = offset.copy(), found
    return best.astype(np.float32)
