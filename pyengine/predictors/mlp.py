"""The learned two-layer form (ProMoE, arXiv 2410.22134, section 4): relu(w1 x + b1), then w2.

It starts as the linear predictor, which two ReLUs per expert express exactly, with further units that at first
contribute nothing; so it can only come off better. Mini-batch Adam (arXiv 1412.6980) in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pyengine.predictors.predictor import Predictor
from pyengine.predictors.recall import recall

Floats = npt.NDArray[np.float32]

NAME = "mlp"

_BATCH = 256
#: Epochs: at most so many, fewer where they make more steps than this.
_MOST_EPOCHS = 60
_STEPS = 1500
_LEAST_EPOCHS = 8
#: Of the epochs, the share without a better recall after which training ends.
_PATIENCE = 0.4
_RATE = 1e-3


def hidden_units(n_embd: int, n_expert: int) -> int:
    """Units of the first layer: those of the linear predictor, and as many as the input is wide, at most 512."""
    return 2 * n_expert + min(n_embd, 512)


def fit_mlp(
    linear: Predictor,
    inputs: Floats,
    goal: Floats,
    choose_inputs: Floats,
    choose_ids: npt.NDArray[np.uint16],
    n_hidden: int,
    seed: int = 0,
) -> Predictor:
    """Train from the linear predictor towards `goal`; the epoch that recalls best on the other tokens counts.

    Args:
        linear: a predictor without w1.
        inputs, goal: float32 [n, n_embd] and [n, n_expert], what is fitted.
        choose_inputs, choose_ids: of other tokens.
        n_hidden: at least 2 * n_expert.
        seed: of the further units and of the batches.
    """
    random = np.random.default_rng(seed)
    mean = inputs.mean(axis=0)
    spread = np.maximum(inputs.std(axis=0), np.float32(1e-6))
    size = float(goal.std()) or 1.0  # the loss and the step size should not depend on the router's scale
    z, wanted = (inputs - mean) / spread, goal / size
    weights = _start(linear, mean, spread, size, n_hidden, random)
    best = _folded(linear, weights, mean, spread)
    best_recall = recall(best.scores(choose_inputs), choose_ids, choose_ids.shape[1])
    adam, waited = _Adam(weights), 0
    n_batch = max(1, len(z) // _BATCH)
    epochs = min(_MOST_EPOCHS, max(_LEAST_EPOCHS, _STEPS // n_batch))
    for epoch in range(epochs):
        order = random.permutation(len(z))
        for i, batch in enumerate(np.array_split(order, n_batch)):
            rate = _RATE * (1 - (epoch * n_batch + i) / (epochs * n_batch))
            adam.step(_gradients(weights, z[batch], wanted[batch]), rate)
        if not all(np.isfinite(w).all() for w in weights):
            break
        now = _folded(linear, weights, mean, spread)
        found = recall(now.scores(choose_inputs), choose_ids, choose_ids.shape[1])
        waited = 0 if found > best_recall else waited + 1
        if found > best_recall:
            best, best_recall = now, found
        if waited > _PATIENCE * epochs:
            break
    return best


def _start(
    linear: Predictor, mean: Floats, spread: Floats, size: float, n_hidden: int, random: np.random.Generator
) -> list[Floats]:
    """[w1, b1, w2, b2] on standardised inputs and goals: relu(a) - relu(-a) = a gives the linear predictor."""
    n_expert, n_embd = linear.w2.shape
    matrix = linear.w2 * spread / size
    offset = (linear.b2 + linear.w2 @ mean) / size
    further = max(0, n_hidden - 2 * n_expert)
    free = random.standard_normal((further, n_embd)) / np.sqrt(n_embd)
    w1 = np.concatenate([matrix, -matrix, free])
    b1 = np.concatenate([offset, -offset, np.zeros(further)])
    w2 = np.concatenate([np.eye(n_expert), -np.eye(n_expert), np.zeros((n_expert, further))], axis=1)
    return [np.ascontiguousarray(a, np.float32) for a in (w1, b1, w2, np.zeros(n_expert))]


def _gradients(weights: Sequence[Floats], z: Floats, wanted: Floats) -> list[Floats]:
    """Of half the mean squared error."""
    w1, b1, w2, b2 = weights
    hidden = np.maximum(z @ w1.T + b1, 0)
    error = (hidden @ w2.T + b2 - wanted) / np.float32(len(z))
    back = (error @ w2) * (hidden > 0)
    return [back.T @ z, back.sum(axis=0), error.T @ hidden, error.sum(axis=0)]


def _folded(linear: Predictor, weights: Sequence[Floats], mean: Floats, spread: Floats) -> Predictor:
    """The network on raw inputs. The goals' scale stays out: it changes no order."""
    w1, b1, w2, b2 = weights
    raw = (w1 / spread).astype(np.float32)
    shifted = (b1 - raw @ mean).astype(np.float32)
    return Predictor(NAME, linear.target, linear.distance, w2.copy(), b2.copy(), raw, shifted)


class _Adam:
    """First and second moments with decays 0.9 and 0.99; changes the weights in place."""

    def __init__(self, weights: Sequence[Floats]) -> None:
        self._weights = weights
        self._first = [np.zeros_like(w) for w in weights]
        self._second = [np.zeros_like(w) for w in weights]
        self._n = 0

    def step(self, gradients: Sequence[Floats], rate: float) -> None:
        self._n += 1
        one, two = 1 - 0.9**self._n, 1 - 0.99**self._n
        for w, g, m, v in zip(self._weights, gradients, self._first, self._second, strict=True):
            m += np.float32(0.1) * (g - m)
            v += np.float32(0.01) * (g * g - v)
            w -= np.float32(rate / one) * m / (np.sqrt(v / np.float32(two)) + np.float32(1e-8))
