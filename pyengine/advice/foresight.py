"""Tells a running engine what to guess ahead with: predictors learned from this model's trace, else its own routers."""

from __future__ import annotations

import logging
from pathlib import Path

from pyengine.errors import PyengineError, UsageError
from pyengine.native import LEAST_CHANCE, ModelInfo, NativeEngine, NativePredictor
from pyengine.predictors import Predictor, load_predictors, predictors_file
from pyengine.predictors.calibration import worthwhile

_log = logging.getLogger("pyengine")

#: Word -> what it is.
WAYS = {
    "auto": "predictors learned for this model, else fate; of several forms for a layer, the one that proves best",
    "fate": "the next layer's own router on this layer's gate input, as it is and with the gains set right",
    "off": "nothing is fetched ahead",
}

#: Guesses beyond the experts that a token uses; the engine admits those ranks that come true often enough.
_EXTRA = 4


def check_wording(way: str) -> None:
    """Raise UsageError unless it is a key of WAYS."""
    if way not in WAYS:
        raise UsageError(f"there is no way {way!r:.40} to look ahead; there are {', '.join(WAYS)}")


def look_ahead(native: NativeEngine, info: ModelInfo, model: Path, way: str) -> str:
    """Give the engine its predictors. Returns what they are, in a word; "off" if there are none.

    A model whose routers cannot be read is no error: prediction only saves time.
    """
    check_wording(way)
    if way == "off" or info.n_layer < 2:
        return "off"
    learned = _learned(model, info) if way == "auto" else []
    # What was learned from other texts may be worse than the router itself: the engine finds out.
    predictors = [*learned, *_fate(model, info, {(p.form, p.target) for p in learned})]
    native.set_predictors([_native(p, info) for p in predictors])
    return "learned" if learned else "fate" if predictors else "off"


def _native(p: Predictor, info: ModelInfo) -> NativePredictor:
    take, chances = info.n_expert_used + _EXTRA, None
    if p.calibration is not None:
        chances = p.calibration.by_rank_absent
        take = max(info.n_expert_used, worthwhile(p.calibration, LEAST_CHANCE, info.n_expert))
    return NativePredictor(p.source, p.target, min(info.n_expert, take), p.w1, p.b1, p.w2, p.b2, chances)


def _learned(model: Path, info: ModelInfo) -> list[Predictor]:
    """Those kept for this model file; none if there are none that fit."""
    try:
        kept = load_predictors(predictors_file(model))
    except (OSError, PyengineError):
        return []
    of = kept.model
    if (of.n_layer, of.n_expert, of.n_expert_used) != (info.n_layer, info.n_expert, info.n_expert_used):
        return []
    return [p for p in kept.predictors if p.n_embd == info.n_embd and p.distance > 0]


def _fate(model: Path, info: ModelInfo, known: set[tuple[str, int]]) -> list[Predictor]:
    """Both forms for every layer but the first, as far as the model's routers allow and they are not `known`."""
    from pyengine.predictors.fate import CORRECTED, PLAIN, correctable, fate
    from pyengine.predictors.routers import read_routers

    try:
        routers = read_routers(model, info.n_layer)
    except (PyengineError, OSError, ValueError) as reason:
        _log.info("the routers cannot guess ahead: %s", reason)
        return []
    found = []
    for target in range(1, info.n_layer):
        forms = {PLAIN: False}
        if correctable(routers[target - 1], routers[target]):
            forms = {CORRECTED: True, PLAIN: False}
        found += [
            fate(routers, target, 1, corrected=corrected)
            for form, corrected in forms.items()
            if (form, target) not in known
        ]
    return found
