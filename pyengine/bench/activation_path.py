"""Activation-path prediction (MoE-Infinity, arXiv 2401.14361) as a baseline: what this request and the nearest past one
used is kept, and fetched ahead for all layers at the start of each token."""

from __future__ import annotations

import numpy as np

from pyengine.advice.keeper import Keeper
from pyengine.native import ModelInfo, NativeEngine
from pyengine.traces.routing_log import RoutingLog, Token


class PathPrefetcher(Keeper):
    """Its cache policy, and after every token the likeliest experts of each layer, as many as a token uses, queued in
    the order of the layers. The engine gives up what a layer's router did not name, as with its own guesses."""

    def __init__(self, native: NativeEngine, info: ModelInfo, log: RoutingLog) -> None:
        super().__init__(native, info, log, "activation-path")
        self._n_used = info.n_expert_used

    def token(self, token: Token) -> None:
        super().token(token)
        likeliest = np.argsort(-self._policy.priorities(), axis=1, kind="stable")[:, : self._n_used]
        for layer, experts in enumerate(likeliest.tolist()):
            self._native.expect(layer, experts, keep=False)
