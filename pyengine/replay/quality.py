"""How good a predictor is by itself, without a cache and without time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pyengine.replay.predictors import Predictor
from pyengine.replay.steps import Steps


@dataclass(frozen=True)
class Recall:
    """Share of the needed experts that were named, float64 [n_layer]."""

    distance: int
    """layers that the prediction looked ahead"""
    more: int
    """experts named beyond n_expert_used"""
    at_k: npt.NDArray[np.float64]
    """among the best n_expert_used"""
    at_more: npt.NDArray[np.float64]
    """among the best n_expert_used + more"""
    exact: npt.NDArray[np.float64]
    """share of the sets that the best n_expert_used hit as a whole"""

    def as_json(self) -> dict[str, Any]:
        return {
            "distance": self.distance,
            "more": self.more,
            "recall_at_k": float(self.at_k.mean()),
            "recall_at_k_more": float(self.at_more.mean()),
            "exact_sets": float(self.exact.mean()),
            "recall_at_k_by_layer": self.at_k.tolist(),
            "recall_at_k_more_by_layer": self.at_more.tolist(),
        }


def recall(steps: Steps, predictor: Predictor, distance: int, more: int) -> Recall:
    """Recall of a fresh predictor over all tokens, each named when the layer `distance` before it has spoken."""
    n_token, n_layer, n_used = steps.ids.shape
    counts = np.zeros((3, n_layer))
    for token in range(n_token):
        for layer in range(n_layer):
            scores = predictor.predict(token, layer, max(0, layer - distance + 1))
            if scores is None:
                continue
            best = np.argsort(-scores, kind="stable")[: n_used + more]
            needed = set(steps.ids[token, layer].tolist())
            named = [e for e in best.tolist() if scores[e] > 0]
            found = len(needed.intersection(named[:n_used]))
            counts[:, layer] += found, len(needed.intersection(named)), found == n_used
        predictor.observe(token)
    counts[:2] /= n_used
    counts /= max(1, n_token)
    return Recall(distance, more, *counts)
