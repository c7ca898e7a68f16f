"""What a cache policy is: it sees which experts tokens use and says, once per token, how much each is worth keeping.

The native engine evicts the expert of lowest priority among the unpinned residents, ties by oldest use. So a policy is
a function from history to one float per expert: all zero is LRU, +inf a pin. A policy knows nothing of slots' contents,
bytes or time, and a wrong one costs time, never tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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

    def observe_prompt(self, pairs: npt.NDArray[Any]) -> None:
        """A micro-batch of several tokens was computed.

        Args:
            pairs: int64 or float64 [n_layer, n_expert], tokens that chose each expert; of several texts what
                as_one_text() makes of them.
        """
        return

    def priorities(self) -> npt.NDArray[np.float32]:
        """float32 [n_layer, n_expert]: what to keep from now on, higher stays longer. The caller may change it."""
        ...


def as_one_text(pairs: npt.NDArray[np.int64], n_used: int, shares: Sequence[int]) -> npt.NDArray[np.float64]:
    """A step of several texts, as policies are shown it: as many tokens of one text as the text with the fewest has,
    each with the average of all.

    How old a use is counts in steps, then: 16 texts that decode are one access to the cache, not 16 after each other.
    Told as 16 tokens, LFU misses 2 to 10 % more experts (gpt-oss-20b and the bundled model, 8 and 16 texts, 25 and 50 %
    of the experts in slots), and a prompt's chunk that counted by its length would add up to 2 %.

    Args:
        pairs: int64 [n_layer, n_expert], tokens that chose each expert.
        n_used: experts per token and layer.
        shares: tokens of each text, at least one each.
    """
    sums = np.maximum(pairs.sum(axis=1, keepdims=True), 1)
    one: npt.NDArray[np.float64] = pairs * (n_used * min(shares) / sums)
    return one
