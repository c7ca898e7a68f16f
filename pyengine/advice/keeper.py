"""Tells a running engine what to keep: a cache policy sees every token and gives each expert a priority."""

from __future__ import annotations

import numpy as np

from pyengine.native import ModelInfo, NativeEngine
from pyengine.policies import CacheShape, make_policy
from pyengine.traces.routing_log import Prompt, RoutingLog, Token


class Keeper:
    """
    Args:
        native: the engine; log: what its routers choose.
        policy: a name in pyengine.policies.POLICIES.

    Raises:
        UsageError: there is no such policy.
    """

    def __init__(self, native: NativeEngine, info: ModelInfo, log: RoutingLog, policy: str) -> None:
        self._native = native
        self._shape = (info.n_layer, info.n_expert)
        slots = native.stats()["slots"]
        self._policy = make_policy(policy, CacheShape(info.n_layer, info.n_expert, info.n_expert_used, slots))
        log.listen(self)

    def token(self, token: Token) -> None:
        # An engine that does not see weights records zeros.
        weights = token.weights.astype(np.float32) if token.weights.any() else None
        self._policy.observe(token.ids, weights)
        self._native.set_priorities(self._policy.priorities())

    def prompt(self, prompt: Prompt) -> None:
        pairs = np.zeros(self._shape, np.int64)
        layers = np.repeat(np.arange(self._shape[0]), prompt.counts)
        pairs[layers, prompt.experts] = prompt.pairs
        self._policy.begin_sequence()
        self._policy.observe_prompt(pairs)
        self._native.set_priorities(self._policy.priorities())
