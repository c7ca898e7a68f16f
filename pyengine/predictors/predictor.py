"""What a predictor is: one or two matrices that turn a gate input into a score per expert of a later layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pyengine.errors import PyengineError

Floats = npt.NDArray[np.float32]


class PredictorError(PyengineError, ValueError):
    """Predictors that are damaged, of another model, or cannot be made from what there is."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """How far to trust a predictor's ranks and scores; measured on tokens that it was not fitted to.

    The margin of an expert is its score less the mean of the token's k-th and (k+1)-th highest: above zero it is among
    the k. Margins do not change when a constant is added to all scores.
    """

    by_rank: Floats
    """float32 [n_expert]: probability that the expert at this rank is used; never ascending"""
    by_rank_absent: Floats
    """float32 [n_expert]: the same of experts that are absent with half of all in LRU slots; never ascending"""
    slope: float
    """P(used | margin) = 1 / (1 + exp(-(slope * margin + intercept)))"""
    intercept: float
    threshold: float
    """probability that a quarter of all predictions exceed: Fate's 75th percentile of confidence"""


@dataclass(frozen=True, eq=False)
class Predictor:
    """scores = w2 h + b2 with h = relu(w1 x + b1), or h = x where there is no w1; float32 throughout.

    x is the gate input of layer `target - distance`: what that layer's router and experts read, float32 [n_embd].
    Layers are counted among those that have experts.
    """

    form: str
    """a name of pyengine.predictors.FORMS"""
    target: int
    """layer whose experts are scored"""
    distance: int
    """layers between the gate input and the target"""
    w2: Floats
    """float32 [n_expert, n_hidden], or [n_expert, n_embd] without w1"""
    b2: Floats
    """float32 [n_expert]"""
    w1: Floats | None = None
    """float32 [n_hidden, n_embd]"""
    b1: Floats | None = None
    """float32 [n_hidden]"""
    calibration: Calibration | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    """measured on held-out tokens, e.g. "recall@k", "recall@k+2", "exact", "miss_recall@k"; empty if never measured"""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def source(self) -> int:
        """The layer whose gate input is read."""
        return self.target - self.distance

    @property
    def n_embd(self) -> int:
        return int((self.w2 if self.w1 is None else self.w1).shape[1])

    @property
    def n_expert(self) -> int:
        return int(self.w2.shape[0])

    @property
    def multiply_adds(self) -> int:
        """Per token: the predictor's own cost. Each reads as many float32."""
        return self.w2.size + (0 if self.w1 is None else self.w1.size)

    def scores(self, inputs: Floats) -> Floats:
        """float32 [n, n_expert] for gate inputs [n, n_embd] of layer `source`."""
        hidden = np.asarray(inputs, np.float32)
        if self.w1 is not None and self.b1 is not None:
            hidden = np.maximum(hidden @ self.w1.T + self.b1, np.float32(0))
        return np.asarray(hidden @ self.w2.T + self.b2, np.float32)


def _check(p: Predictor) -> None:
    """Raise PredictorError unless shapes and types fit each other and every number is finite."""
    if p.distance < 0 or p.target < p.distance:
        raise PredictorError(f"a predictor for layer {p.target} cannot read {p.distance} layers before it")
    if (p.w1 is None) != (p.b1 is None):
        raise PredictorError(f"the predictor for layer {p.target} has half a first layer")
    shapes = p.w2.ndim == 2 and p.b2.shape == p.w2.shape[:1] and p.w2.size > 0
    if p.w1 is not None and p.b1 is not None:
        shapes = shapes and p.w1.ndim == 2 and p.b1.shape == p.w1.shape[:1] == p.w2.shape[1:] and p.w1.size > 0
    arrays = [a for a in (p.w1, p.b1, p.w2, p.b2) if a is not None]
    c = p.calibration
    if c is not None:
        arrays += [c.by_rank, c.by_rank_absent]
        shapes = shapes and c.by_rank.shape == c.by_rank_absent.shape == p.b2.shape
    if not shapes:
        raise PredictorError(f"the predictor for layer {p.target} has matrices that do not fit each other")
    if any(a.dtype != np.float32 for a in arrays):
        raise PredictorError(f"the predictor for layer {p.target} has numbers that are not float32")
    numbers = [] if c is None else [c.slope, c.intercept, c.threshold]
    if not all(np.isfinite(a).all() for a in arrays) or not np.isfinite(numbers).all():
        raise PredictorError(f"the predictor for layer {p.target} has numbers that are not finite")


def with_offset(p: Predictor, offset: Floats) -> Predictor:
    """The same predictor with `offset`, float32 [n_expert], added to its scores."""
    from dataclasses import replace

    return replace(p, b2=(p.b2 + offset).astype(np.float32))
