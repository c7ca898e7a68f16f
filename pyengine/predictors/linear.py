"""The learned linear form: one matrix, fitted in closed form.

What is fitted is not which experts were used but the scores that the target layer's router gave: the trace has the
gate input of the target layer too, so they are known exactly. The matrix is the better one of Fate's two plus a
correction, found by ridge regression on what Fate leaves over; with a strong ridge it stays Fate's. Where the model's
routers are not at hand, or do not read the gate input, the experts used (one, else zero) take the scores' place.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pyengine.predictors.predictor import Predictor
from pyengine.predictors.recall import recall

Floats = npt.NDArray[np.float32]

NAME = "linear"

#: Ridges that are tried, in units of the inputs' mean variance times the number of tokens.
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


class Gram:
    """The inputs' side of a ridge regression, shared by all targets of one source layer.

    Args:
        inputs: float32 [n, n_embd].
    """

    def __init__(self, inputs: Floats) -> None:
        self.mean = inputs.mean(axis=0)
        self.centred = inputs - self.mean
        self._products = self.centred.T @ self.centred
        self._scale = float(np.trace(self._products)) / len(self._products) or 1.0

    def solve(self, goal: Floats, ridge: float) -> Floats:
        """float32 [n_out, n_embd]: the matrix that maps centred inputs onto `goal`, [n, n_out] with mean zero."""
        products = self._products.copy()
        products[np.diag_indices_from(products)] += np.float32(ridge * self._scale)
        return np.asarray(np.linalg.solve(products, self.centred.T @ goal).T, np.float32)


def fit_linear(
    start: Predictor,
    gram: Gram,
    inputs: Floats,
    goal: Floats,
    choose_inputs: Floats,
    choose_ids: npt.NDArray[np.uint16],
) -> Predictor:
    """The linear predictor with the ridge that recalls best on tokens it was not fitted to.

    Args:
        start: a linear predictor whose scores are corrected; all zero if there is none.
        gram: of `inputs`.
        inputs: float32 [n, n_embd], gate inputs of the source layer.
        goal: float32 [n, n_expert], scores to come near.
        choose_inputs, choose_ids: gate inputs and experts used of other tokens.
    """
    left = goal - start.scores(inputs)
    offset = left.mean(axis=0)
    left -= offset
    best, best_recall = start, -1.0
    for ridge in RIDGES:
        change = gram.solve(left, ridge)
        w2 = (start.w2 + change).astype(np.float32)
        b2 = (start.b2 + offset - change @ gram.mean).astype(np.float32)
        if not (np.isfinite(w2).all() and np.isfinite(b2).all()):
            continue  # inputs so alike that a small ridge cannot tell them apart
        fitted = Predictor(NAME, start.target, start.distance, w2, b2)
        found = recall(fitted.scores(choose_inputs), choose_ids, choose_ids.shape[1])
        if found > best_recall:
            best, best_recall = fitted, found
    return Predictor(NAME, start.target, start.distance, best.w2, best.b2)
