"""Learning rates of runs that end after a given time rather than after a given number of steps."""

from __future__ import annotations

import math
import time

import torch

_SYNC_EVERY = 10
"""steps between waits for the device, so that the clock on the host means something"""


class TimedRun:
    """Counts steps and measures how far a run is. The clock starts after the first step, which compiles."""

    def __init__(self, seconds: float) -> None:
        self.steps = 0
        self._seconds = seconds
        self._start: float | None = None

    @property
    def elapsed(self) -> float:
        """Seconds since the first step's end."""
        return 0.0 if self._start is None else time.monotonic() - self._start

    @property
    def progress(self) -> float:
        """From 0 at the start to 1 at the end."""
        return min(1.0, self.elapsed / self._seconds)

    @property
    def milliseconds_per_step(self) -> float:
        """Mean duration of the steps after the first."""
        return self.elapsed / max(1, self.steps - 1) * 1e3

    def finish_step(self) -> None:
        """Call after every step."""
        if self.steps % _SYNC_EVERY == 0 and torch.cuda.is_available():
            torch.cuda.synchronize()
        if self._start is None:
            self._start = time.monotonic()
        self.steps += 1

    def rate_factor(self, warmup_steps: int, final: float, progress: float) -> float:
        """Relative learning rate: linear warm-up by steps, and a cosine from 1 to `final` by progress."""
        warmup = min(1.0, (self.steps + 1) / warmup_steps)
        return warmup * (final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress)))
