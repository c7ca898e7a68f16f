"""MRS, minus recent score (HybriMoE, arXiv 2504.05897): what routers give an expert, averaged, not how often it is
used.

S <- a * TopP(s) + (1 - a) * S, where TopP keeps the router's largest scores. Only the scores of chosen experts reach
us, so TopP keeps those. Where none are known, rank stands in for them; where the order is unknown too, all are alike
and MRS is decayed LFU.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pyengine.policies.lfu import DecayedCounts
from pyengine.policies.policy import CacheShape, Policy

#: The weight `a` of the newest token. Of 0.005 to 0.05 the best on the same stretches as LFU's decay: 84.08 % at 12
#: slots.
NEWEST = 0.03


class MrsPolicy(Policy):
    def __init__(self, shape: CacheShape, newest: float = NEWEST) -> None:
        # A constant factor apart, `a` of the newest and (1 - a) of the rest is a sum that decays by 1 - a.
        self._scores = DecayedCounts(shape, 1 - newest)
        n = shape.n_expert_used
        ranks = np.arange(n, 0, -1, dtype=np.float32)
        self._by_rank = ranks / ranks.sum()
        self._alike = np.float32(1 / n)

    def observe(self, ids: npt.NDArray[np.uint16], weights: npt.NDArray[np.float32] | None) -> None:
        if weights is not None:
            self._scores.add(ids, weights)
        elif ids.shape[1] > 1 and bool(np.any(ids[:, 1:] < ids[:, :-1])):
            self._scores.add(ids, self._by_rank)
        else:
            self._scores.add(ids, float(self._alike))

    def observe_prompt(self, pairs: npt.NDArray[np.int64]) -> None:
        self._scores.add_prompt(pairs, 1.0)

    def priorities(self) -> npt.NDArray[np.float32]:
        return self._scores.values.copy()
