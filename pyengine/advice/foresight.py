"""Tells a running engine what to guess ahead with: predictors learned from this model's trace, else its own routers."""

from __future__ import annotations

import logging
from pathlib import Path

from pyengine.errors import PyengineError, UsageError
from pyengine.native import ModelInfo, NativeEngine, NativePredictor
from pyengine.predictors import Predictor, load_predictors, predictors_file

_log = logging.getLogger("pyengine")

#: Word -> what it is.
WAYS = {
    "auto": "predictors learned for this model, else fate",
    "fate": "the next layer's own router on this layer's gate input, gains set right where they are known",
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
    predictors = _learned(model, info) if way == "auto" else []
    word = "learned"
    if not predictors:
        word = "fate"
        try:
            predictors = _fate(model, info)
        except (PyengineError, OSError, ValueError) as reason:
            _log.info("nothing is fetched ahead: %s", reason)
            return "off"
    take = min(info.n_expert, info.n_expert_used + _EXTRA)
    native.set_predictors(
        [
            NativePredictor(
                p.source,
                p.target,
                take,
                p.w1,
                p.b1,
                p.w2,
                p.b2,
                None if p.calibration is None else p.calibration.by_rank_absent,
            )
            for p in predictors
        ]
    )
    return word


def _learned(model: Path, info: ModelInfo) -> list[Predictor]:
    """Those kept for this model file, of distance 1; none if there are none that fit."""
    try:
        kept = load_predictors(predictors_file(model))
    except (OSError, PyengineError):
        return []
    of = kept.model
    if (of.n_layer, of.n_expert, of.n_expert_used) != (info.n_layer, info.n_expert, info.n_expert_used):
        return []
    return [p for p in kept.at(1) if p.n_embd == info.n_embd]


def _fate(model: Path, info: ModelInfo) -> list[Predictor]:
    from pyengine.predictors.fate import correctable, fate
    from pyengine.predictors.routers import read_routers

    routers = read_routers(model, info.n_layer)
    return [
        fate(routers, target, 1, corrected=correctable(routers[target - 1], routers[target]))
        for target in range(1, info.n_layer)
    ]
