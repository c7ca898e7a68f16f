"""Least recently used: no opinion at all, and the engine's ties go by age."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pyengine.policies.policy import CacheShape, Policy


class LruPolicy(Policy):
    def __init__(self, shape: CacheShape) -> None:
        self._shape = shape

    def priorities(self) -> npt.NDArray[np.float32]:
        return np.zeros((self._shape.n_layer, self._shape.n_expert), np.float32)
