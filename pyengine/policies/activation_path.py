"""Activation-path priorities (MoE-Infinity, arXiv 2401.14361): requests of one kind use the same experts all along.

The activations of a request, uses by layer and expert, are compared by cosine with those of past requests. An expert is
worth its share of the layer's uses in this request and in the nearest past one, and more in early layers:
(share + epsilon) * (1 - layer / n_layer).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pyengine.policies.policy import CacheShape, Policy

#: Past requests that are remembered; the oldest makes room.
_REQUESTS = 128
_EPSILON = np.float32(1e-3)


class ActivationPathPolicy(Policy):
    def __init__(self, shape: CacheShape) -> None:
        self._shape = shape
        n = shape.n_layer * shape.n_expert
        self._offsets = np.arange(shape.n_layer)[:, None] * shape.n_expert
        self._now = np.zeros(n, np.float32)
        self._past = np.zeros((_REQUESTS, n), np.float32)
        # A column each, so that what one token's experts are worth lies together.
        self._columns = np.zeros((n, _REQUESTS), np.float32)
        self._lengths = np.full(_REQUESTS, np.inf, np.float32)  # Euclidean
        self._products = np.zeros(_REQUESTS, np.float32)  # with the present request
        self._n_past = 0
        self._decoded = 0
        layers = np.arange(shape.n_layer, dtype=np.float32)[:, None]
        self._by_layer = 1 - layers / np.float32(shape.n_layer)

    def begin_sequence(self) -> None:
        self._close()

    def observe(self, ids: npt.NDArray[np.uint16], weights: npt.NDArray[np.float32] | None) -> None:
        experts = (ids + self._offsets).ravel()
        self._now[experts] += 1
        self._products += self._columns[experts].sum(axis=0)
        self._decoded += 1

    def observe_prompt(self, pairs: npt.NDArray[np.int64]) -> None:
        if self._decoded:  # a prompt after an answer begins a request, whoever called it so or not
            self._close()
        self._now += pairs.ravel()
        self._products = self._past @ self._now

    def priorities(self) -> npt.NDArray[np.float32]:
        shares = self._shares(self._now)
        if self._n_past:
            # The length of the present request is the same for all.
            nearest = int(np.argmax(self._products / self._lengths))
            shares += self._shares(self._past[nearest])
        worth: npt.NDArray[np.float32] = (shares + _EPSILON) * self._by_layer
        return worth

    def _shares(self, uses: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        by_layer = uses.reshape(self._shape.n_layer, self._shape.n_expert)
        shares: npt.NDArray[np.float32] = by_layer / np.maximum(by_layer.sum(axis=1, keepdims=True), np.float32(1))
        return shares

    def _close(self) -> None:
        """The present request becomes a past one."""
        if self._now.any():
            place = self._n_past % _REQUESTS
            self._past[place] = self._columns[:, place] = self._now
            self._lengths[place] = np.linalg.norm(self._now)
            self._n_past += 1
        self._now[:] = 0
        self._products[:] = 0
        self._decoded = 0
