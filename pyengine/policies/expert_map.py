"""Expert maps (fMoE, arXiv 2502.05370): the routing of one token resembles that of some token before, and so does what
comes after it.

An expert map is the routing weights of one token in all layers. The latest map is looked for among stored ones
(trajectory search, by cosine), and the maps that followed the nearest say how probable each expert is now. The paper
evicts the largest 1 / (probability * frequency): the priority here is probability * frequency.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pyengine.policies.lfu import DecayedCounts
from pyengine.policies.policy import CacheShape, Policy

#: Maps that are stored; the oldest makes room.
_MAPS = 256
#: Nearest maps that are averaged.
_NEAREST = 8
#: Probability of an expert that no neighbour used. Without it frequency would not tell those apart.
_FLOOR = np.float32(0.02)
_DECAY = 0.97


class ExpertMapPolicy(Policy):
    def __init__(self, shape: CacheShape) -> None:
        self._shape = shape
        n, n_used = shape.n_layer * shape.n_expert, shape.n_layer * shape.n_expert_used
        self._frequency = DecayedCounts(shape, _DECAY)
        self._offsets = np.arange(shape.n_layer)[:, None] * shape.n_expert
        self._alike = np.full(n_used, 1 / shape.n_expert_used, np.float32)
        # A column each, so that the rows of a token's experts lie together; and what the columns hold.
        self._maps = np.zeros((n, _MAPS), np.float32)
        self._lengths = np.full(_MAPS, np.inf, np.float32)
        self._experts = np.zeros((_MAPS, n_used), np.int64)
        self._weights = np.zeros((_MAPS, n_used), np.float32)
        self._n_map = 0
        self._probable = np.zeros(n, np.float32)

    def observe(self, ids: npt.NDArray[np.uint16], weights: npt.NDArray[np.float32] | None) -> None:
        self._frequency.add(ids)
        experts = (ids + self._offsets).ravel()
        values = self._alike if weights is None else weights.ravel().astype(np.float32)
        self._search(experts, values)
        self._store(experts, values)

    def observe_prompt(self, pairs: npt.NDArray[np.int64]) -> None:
        self._frequency.add_prompt(pairs, self._shape.n_expert_used)
        self._probable[:] = 0

    def priorities(self) -> npt.NDArray[np.float32]:
        probable = self._probable.reshape(self._shape.n_layer, self._shape.n_expert)
        return (probable + _FLOOR) * self._frequency.normalised()

    def _search(self, experts: npt.NDArray[np.int64], values: npt.NDArray[np.float32]) -> None:
        """Which experts followed the maps that resemble this one."""
        n = min(self._n_map - 1, _MAPS - 1)  # all but the newest, which nothing has followed yet
        self._probable[:] = 0
        if n < 1:
            return
        alike = values @ self._maps[experts] / self._lengths
        newest = (self._n_map - 1) % _MAPS
        alike[newest] = -1
        k = min(_NEAREST, n)
        nearest = np.argpartition(alike, -k)[-k:]
        followers = (nearest + 1) % _MAPS
        for follower in followers.tolist():
            self._probable[self._experts[follower]] += self._weights[follower] / np.float32(k)

    def _store(self, experts: npt.NDArray[np.int64], values: npt.NDArray[np.float32]) -> None:
        column = self._n_map % _MAPS
        self._maps[self._experts[column], column] = 0
        self._maps[experts, column] = values
        self._experts[column], self._weights[column] = experts, values
        self._lengths[column] = np.linalg.norm(values)
        self._n_map += 1
