"""How long things take in a timed replay."""

from __future__ import annotations

from dataclasses import dataclass

#: An expert moves in pieces of this size: what a demand load waits for at most, bytes. As in the native engine.
CHUNK_BYTES = 256 << 10


@dataclass(frozen=True)
class Timing:
    bytes_per_s: float
    """of the disk, experts read one after the other"""
    expert_bytes: int
    """of one expert"""
    token_s: float
    """one decoded token with nothing missing"""
    expert_share: float = 0.5
    """of token_s that is spent in expert kernels"""

    @property
    def load_s(self) -> float:
        """One expert on an idle disk."""
        return self.expert_bytes / self.bytes_per_s

    def layer_s(self, n_layer: int) -> float:
        """One layer with nothing missing."""
        return self.token_s / n_layer

    def ratio(self, n_layer: int) -> float:
        """R of the papers: moving one expert over computing one layer."""
        return self.load_s / self.layer_s(n_layer)

    def bound_tokens_per_s(self, missing_per_token: float) -> float:
        """What no overlap can beat: computing or reading, whichever takes longer."""
        return 1 / max(self.token_s, missing_per_token * self.load_s)
