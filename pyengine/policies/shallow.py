"""Shallow-favoring cache (Fate, arXiv 2502.12224): the first layers stay resident whole, because what they need cannot
be predicted from a layer before; the other slots are split evenly over the deeper layers, each ruled by ARC.

Where each layer has its own slots there is nothing to split: then this is ARC.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pyengine.policies.arc import ArcLists, most_chosen
from pyengine.policies.policy import CacheShape, Policy

#: Layers to pin if the others keep enough: Fate's choice for Qwen1.5-MoE.
SHALLOW = 3


def layers_to_pin(shape: CacheShape, most: int = SHALLOW) -> int:
    """How many of the first layers fit whole while every deeper layer keeps slots for two tokens."""
    if shape.per_layer:
        return 0
    least = min(shape.n_expert, 2 * shape.n_expert_used)
    fitting = [
        n
        for n in range(min(most, shape.n_layer) + 1)
        if n * shape.n_expert + (shape.n_layer - n) * least <= shape.slots
    ]
    return max(fitting, default=0)


class ShallowPolicy(Policy):
    def __init__(self, shape: CacheShape, most: int = SHALLOW) -> None:
        self._shape = shape
        self._pinned = layers_to_pin(shape, most)
        deep = shape.n_layer - self._pinned
        share = (shape.slots - self._pinned * shape.n_expert) // max(1, deep)
        self._lists = ArcLists(np.full(deep, min(share, shape.n_expert), np.int64), shape.n_expert)

    def observe(self, ids: npt.NDArray[np.uint16], weights: npt.NDArray[np.float32] | None) -> None:
        if self._pinned < self._shape.n_layer:
            self._lists.use(ids[self._pinned :].astype(np.int64))

    def observe_prompt(self, pairs: npt.NDArray[np.int64]) -> None:
        for ids in most_chosen(pairs, self._shape.n_expert_used):
            self.observe(ids, None)

    def priorities(self) -> npt.NDArray[np.float32]:
        out = np.full((self._shape.n_layer, self._shape.n_expert), np.inf, np.float32)
        t1, t2 = self._lists.listed()
        t1_first = self._lists.t1_goes_first()[:, None]
        out[self._pinned :] = t1 * np.where(t1_first, 1, 2) + t2 * np.where(t1_first, 2, 1)
        return out
