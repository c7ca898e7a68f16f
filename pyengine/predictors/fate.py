"""Fate: a layer's own router on the gate input of an earlier layer (arXiv 2502.12224). Needs no training.

The gate input is the residual normed with the earlier layer's gains, and the router wants it normed with its own. The
residual changes little between layers, so diag(gain of the target / gain of the source) sets that right, and folds into
the router's matrix: the corrected form. A norm's bias folds into the offset.

A bias that is added to the sigmoids of the scores (Router.choice_bias) fits into no matrix; where the sigmoid is
steepest its slope is 1/4, so four times the bias on the scores is the first guess. A trace allows a better one:
offsets.py.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pyengine.predictors.predictor import Predictor, PredictorError
from pyengine.predictors.routers import Router

Floats = npt.NDArray[np.float32]

PLAIN, CORRECTED = "fate", "fate-corrected"

#: A gain smaller than this share of the layer's median gain says nothing about the residual behind it.
_LEAST_GAIN = 1e-3


def fate(routers: list[Router], target: int, distance: int, *, corrected: bool) -> Predictor:
    """The predictor for layer `target` from the gate input of layer `target - distance`; distance 0 is the router
    itself.

    Raises:
        PredictorError: corrected, and the gains are not known (see `correctable`).
    """
    source, router = routers[target - distance], routers[target]
    if not corrected:
        weight, offset = _on_own_input(router)
        return Predictor(PLAIN, target, distance, weight, offset + _of_choice(router))
    if not correctable(source, router):
        raise PredictorError(f"layer {target}: the norm before its router is not known")
    assert source.input_gain is not None and router.router_gain is not None
    weight = router.weight * _ratio(router.router_gain, source.input_gain)
    offset = router.bias + _router_shift(router) - weight @ source.input_shift + _of_choice(router)
    return Predictor(CORRECTED, target, distance, weight.astype(np.float32), offset.astype(np.float32))


def correctable(source: Router, router: Router) -> bool:
    """Whether the gains of both layers are known and of one width."""
    if source.input_gain is None or router.router_gain is None:
        return False
    return source.input_gain.shape == router.router_gain.shape == router.weight.shape[1:]


def _on_own_input(router: Router) -> tuple[Floats, Floats]:
    """The router as a function of its own layer's gate input, which in some architectures only the experts read."""
    own, read = router.input_gain, router.router_gain
    if own is None or read is None or own is read or own.shape != read.shape:
        return router.weight, router.bias
    weight = (router.weight * _ratio(read, own)).astype(np.float32)
    return weight, (router.bias - weight @ router.input_shift).astype(np.float32)


def _of_choice(router: Router) -> Floats:
    if router.choice_bias is None:
        return np.zeros(len(router.weight), np.float32)
    return np.asarray(np.float32(4) * router.choice_bias, np.float32)


def _router_shift(router: Router) -> Floats:
    """What the norm's bias adds to the router's scores; nothing where the router reads the residual by itself."""
    if router.router_gain is not router.input_gain:
        return np.zeros(len(router.weight), np.float32)
    return np.asarray(router.weight @ router.input_shift, np.float32)


def _ratio(wanted: Floats, given: Floats) -> Floats:
    """wanted / given; 0 where `given` is so small that the input carries nothing but noise."""
    large = np.abs(given) > _LEAST_GAIN * float(np.median(np.abs(given)))
    return np.divide(wanted, given, out=np.zeros_like(wanted), where=large)
