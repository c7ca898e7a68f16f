"""Predictors of every form that know nothing: wrong guesses exercise an engine more than right ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pyengine.native import ModelInfo, NativePredictor
from pyengine.predictors import Calibration, Predictor, PredictorSet, predictors_file, save_predictors
from pyengine.traces import TracedModel

N_HIDDEN = 24


def random_predictor(info: ModelInfo, form: str, target: int, distance: int, rng: np.random.Generator) -> Predictor:
    """One of a form, "linear" or "mlp". Calibrated as if it were right half of the time, at every rank."""

    def some(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape, dtype=np.float32)

    hidden = form == "mlp"
    half = np.full(info.n_expert, 0.5, np.float32)
    return Predictor(
        form,
        target,
        distance,
        some(info.n_expert, N_HIDDEN if hidden else info.n_embd),
        some(info.n_expert),
        some(N_HIDDEN, info.n_embd) if hidden else None,
        some(N_HIDDEN) if hidden else None,
        Calibration(half, half, 1.0, 0.0, 0.5),
    )


def keep_learned(path: Path, info: ModelInfo, seed: int = 0) -> None:
    """Write the file that an engine takes for what was learned of this model: linear and two-layer ones in turn, of
    distance 1 and 2."""
    rng = np.random.default_rng(seed)
    forms = ("linear", "mlp")
    predictors = [
        random_predictor(info, forms[(target + distance) % 2], target, distance, rng)
        for distance in (1, 2)
        for target in range(distance, info.n_layer)
    ]
    model = TracedModel(path.name, info.architecture, info.n_layer, info.n_expert, info.n_expert_used)
    save_predictors(predictors_file(path), PredictorSet(model, tuple(predictors)))


def native_predictors(info: ModelInfo, look: str, seed: int = 0) -> list[NativePredictor]:
    """What a word like "linear 1" or "mlp 1+2" says: form, and layers between the gate input and the guess. "wild" is
    "mlp" with one number in a hundred not finite."""
    form, _, distances = look.partition(" ")
    rng = np.random.default_rng(seed)
    found = []
    for distance in map(int, distances.split("+")):
        for target in range(distance, info.n_layer):
            p = random_predictor(info, "mlp" if form == "wild" else form, target, distance, rng)
            arrays = [p.w1, p.b1, p.w2, p.b2]
            if form == "wild":
                arrays = [None if a is None else _spoiled(a, rng) for a in arrays]
            found.append(NativePredictor(p.source, target, info.n_expert, *arrays, None))
    return found


def _spoiled(array: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    odd = np.array([np.nan, np.inf, -np.inf], np.float32)
    return np.where(rng.random(array.shape) < 0.01, rng.choice(odd, array.shape), array)
