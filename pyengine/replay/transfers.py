"""The disk of a timed replay: two queues, as in the native engine.

Demand loads (HIGH) go first; prefetches (LOW) move only while no demand load waits, in chunks, so that a demand load
waits for one chunk at most. Time is in seconds since the beginning.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from pyengine.replay.timing import CHUNK_BYTES, Timing


@dataclass
class Transfer:
    """A prefetch on its way to its slot."""

    expert: int
    layer: int
    since: float
    """when it was asked for"""
    left: float
    """bytes to move; 0 with the last chunk in flight"""


class Transfers:
    """
    Args:
        landed: called when a prefetch has arrived.
    """

    def __init__(self, timing: Timing, landed: Callable[[Transfer], None]) -> None:
        self.low: deque[Transfer] = deque()
        self._speed = timing.bytes_per_s
        self._chunk = float(min(CHUNK_BYTES, timing.expert_bytes))
        self._free_at = 0.0  # when the chunk in flight has moved
        self._landed = landed

    def prefetch_until(self, now: float) -> None:
        """Let prefetches move up to `now`; no demand load waits meanwhile."""
        while self.low:
            transfer = self.low[0]
            start = max(self._free_at, transfer.since)
            if (start >= now and transfer.left > 0) or self._free_at > now:
                return
            if start + transfer.left / self._speed <= now:
                self._free_at = start + transfer.left / self._speed
                transfer.left = 0.0
                self.low.popleft()
                self._landed(transfer)
                continue
            chunks = math.ceil((now - start) * self._speed / self._chunk)
            moved = min(transfer.left, chunks * self._chunk)
            transfer.left -= moved
            self._free_at = start + moved / self._speed
            return

    def demand(self, left: float, since: float) -> float:
        """Move the `left` bytes of a demand load, behind those before it. Returns when it arrives."""
        self._free_at = max(self._free_at, since) + left / self._speed
        return self._free_at

    def take(self, layer: int) -> list[Transfer]:
        """A layer's prefetches leave their queue, in order."""
        mine = [t for t in self.low if t.layer == layer]
        if mine:
            self.low = deque(t for t in self.low if t.layer != layer)
        return mine
