"""What a cache policy is: it sees which experts tokens use and says, once per token, how much each is worth keeping.

The native engine evicts the expert of lowest priority among the unpinned residents, ties by oldest use. So a policy is
a function from history to one float per expert: all zero is LRU, +inf a pin. A policy knows nothing of slots' contents,
bytes or time, and a wrong one costs time, never tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class CacheShape:
    """What a policy must know of the cache it advises."""

    n_layer: int
    """layers that have experts"""
    n_expert: int
    """in each layer"""
    n_expert_used: int
    """per token and layer"""
    slots: int
    """of all layers together"""
    per_layer: bool = False
    """True: each layer has slots of its own, the same number; False: all layers share them, as in the native engine"""

    @property
    def slots_per_layer(self) -> float:
        return self.slots / self.n_layer


class Policy(Protocol):
    """A cache policy. Between two tokens the engine calls observe and then priorities. For 48 layers of 128 experts the
    second must stay below 150 microseconds, and the first below 500."""

    def begin_sequence(self) -> None:
        """A new text begins, perhaps on another subject."""
        return

    def observe(self, ids: npt.NDArray[np.uint16], weights: npt.NDArray[np.float32] | None) -> None:
        """A token was decoded.

        Args:
            ids: uint16 [n_layer, n_expert_used], most probable first, or ascending if the order is not known.
            weights: float32 [n_layer, n_expert_used], routing weights of `ids`; None: not known.
        """
        return

    def observe_prompt(self, pairs: npt.NDArray[np.int64]) -> None:
        """A micro-batch of several tokens was computed.

        Args:
            pairs: int64 [n_layer, n_expert], tokens that chose each expert.
        """
        return

    def priorities(self) -> npt.NDArray[np.float32]:
        """float32 [n_layer, n_expert]: what to keep from now on, higher stays longer. The caller may change it."""
        ...
