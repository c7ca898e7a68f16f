"""What can be known of each token's experts before its router speaks: every way's scores, float32 [n_token, n_expert],
higher is likelier; and how probable they make each expert."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pyengine.predictors.calibration import calibrate, confidence, margin
from pyengine.predictors.fate import correctable, fate
from pyengine.predictors.linear import Gram, fit_linear
from pyengine.predictors.predictor import Predictor
from pyengine.predictors.recall import chosen, recall
from pyengine.predictors.routers import Router, read_routers
from pyengine.traces import Trace

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Sources:
    """A trace, the tokens that may be learned from, and the model's routers."""

    trace: Trace
    fit: Indices
    choose: Indices
    routers: list[Router]

    @staticmethod
    def of(trace: Trace, fit: Indices, choose: Indices, model: Path) -> Sources:
        return Sources(trace, fit, choose, read_routers(model, trace.model.n_layer))

    def ids(self, layer: int) -> npt.NDArray[np.uint16]:
        return np.asarray(self.trace.ids[:, layer])

    def used(self, layer: int) -> npt.NDArray[np.bool_]:
        return chosen(self.ids(layer), self.trace.model.n_expert)

    def inputs(self, layer: int) -> Floats:
        return np.asarray(self.trace.inputs[:, layer], np.float32)


def next_router(of: Sources, target: int, distance: int) -> Floats:
    """Scores of Fate's better form for this layer, as the engine has them without anything learned."""
    source, ids = target - distance, of.ids(target)
    forms = [False, True] if correctable(of.routers[source], of.routers[target]) else [False]
    inputs = of.inputs(source)
    scores = [fate(of.routers, target, distance, corrected=c).scores(inputs) for c in forms]
    k = ids.shape[1]
    return max(scores, key=lambda s: recall(s[of.fit], ids[of.fit], k))


def learned_router(of: Sources, target: int, distance: int) -> Floats:
    """Scores of the linear form that `pyengine learn-predictor` would fit."""
    source = target - distance
    inputs, ids = of.inputs(source), of.ids(target)
    goal = fate(of.routers, target, 0, corrected=False).scores(of.inputs(target)[of.fit])
    start: Predictor = fate(of.routers, target, distance, corrected=correctable(of.routers[source], of.routers[target]))
    gram = Gram(inputs[of.fit])
    return fit_linear(start, gram, inputs[of.fit], goal, inputs[of.choose], ids[of.choose]).scores(inputs)


def table(before: npt.NDArray[np.bool_], after: npt.NDArray[np.bool_], fit: Indices) -> tuple[Floats, Floats]:
    """Klotski's correlation table (arXiv 2502.06888, section 6.2), from the tokens `fit`, used two ways.

    Args:
        before, after: bool [n_token, n_expert], experts used by the earlier and the later layer.

    Returns:
        (the mean of P(expert | expert before) over a token's experts, as Klotski sums it up; the log odds of every
        expert if those before were independent witnesses), float32 [n_token, n_expert] each, of all tokens.
    """
    b, a = before[fit].astype(np.float64), after[fit].astype(np.float64)
    counts = b.T @ a  # [before, after]
    share = counts / np.maximum(b.sum(axis=0)[:, None], 1)
    n = a.sum(axis=0)
    with_it = (counts + 0.5) / (n + 1)  # P(before | after)
    without = (b.sum(axis=0)[:, None] - counts + 0.5) / (len(fit) - n + 1)
    weight = np.log(with_it / without) - np.log((1 - with_it) / (1 - without))
    base = np.log((n + 0.5) / (len(fit) - n + 0.5)) + np.log((1 - with_it) / (1 - without)).sum(axis=0)
    x = before.astype(np.float64)
    klotski = x @ share / np.maximum(x.sum(axis=1, keepdims=True), 1)
    return klotski.astype(np.float32), (x @ weight + base).astype(np.float32)


def probable(of: Sources, scores: Floats, target: int) -> Floats:
    """The probability of every expert by these scores, calibrated on the tokens set apart for choosing."""
    ids, k = of.ids(target), of.trace.model.n_expert_used
    nothing = np.zeros((len(of.choose), scores.shape[1]), bool)
    found = calibrate(scores[of.choose], ids[of.choose], nothing)
    return confidence(scores, k, found).astype(np.float32)


def both(of: Sources, one: Floats, other: Floats, target: int) -> Floats:
    """The sum of two scores' margins, the second times the weight with which it recalls most of what is set apart."""
    ids, k = of.ids(target), of.trace.model.n_expert_used
    a, b = (margin(s, k) / max(float(np.std(margin(s[of.fit], k))), 1e-9) for s in (one, other))
    weights = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.5)
    sums = {w: (a + w * b).astype(np.float32) for w in weights}
    return max(sums.values(), key=lambda s: recall(s[of.choose], ids[of.choose], k))
