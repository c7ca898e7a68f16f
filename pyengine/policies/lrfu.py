"""Least recently and frequently used: decayed counts of two rates, so that what a text does now and what it has done
all along both count.

After Lee et al., "LRFU: A Spectrum of Policies that Subsumes the Least Recently Used and Least Frequently Used
Policies", IEEE Transactions on Computers 50(12), 2001: a use is worth F(tokens since). Their F is one exponential; the
sum of two forgets fast at first and slowly later, as experts do.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pyengine.policies.lfu import DecayedCounts
from pyengine.policies.policy import CacheShape, Policy

#: (what a use is worth one token later, what a new one is worth) of each rate. Experts missing per token, against
#: decayed LFU: gpt-oss-20b at 8 and 12 slots per layer, three stretches of 1,200 tokens, 1.6 to 3.3 % fewer; 10 layers
#: x 8 experts at 2 and 4 slots 10 and 16 % fewer; the bundled model at 8, 16 and 24 slots 1.6 % and 0.4 % more and 3.7
#: % fewer. Neighbouring values (0.95 to 0.97; 0.3 to 0.6, worth 2 to 4) differ by less than 2 %.
RATES = ((0.96, 1.0), (0.4, 3.0))


class LrfuPolicy(Policy):
    def __init__(self, shape: CacheShape) -> None:
        self._counts = [(DecayedCounts(shape, decay), np.float32(worth)) for decay, worth in RATES]
        self._n_used = float(shape.n_expert_used)

    def observe(self, ids: npt.NDArray[np.uint16], weights: npt.NDArray[np.float32] | None) -> None:
        for counts, _ in self._counts:
            counts.add(ids)

    def observe_prompt(self, pairs: npt.NDArray[np.int64]) -> None:
        for counts, _ in self._counts:
            counts.add_prompt(pairs, self._n_used)

    def priorities(self) -> npt.NDArray[np.float32]:
        values = np.zeros_like(self._counts[0][0].values)
        for counts, worth in self._counts:
            values += worth * counts.normalised()
        return values
