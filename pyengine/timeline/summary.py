"""What a recording says in a few figures and one line."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from pyengine.timeline.recording import Recording
from pyengine.timeline.spans import Shares


@dataclass(frozen=True)
class Summary:
    """Per token: times in ms, medians over the tokens; accesses of experts, means."""

    tokens: int
    total: float
    kernels: float
    waiting: float
    predicting: float
    engine: float
    other: float
    """see Shares; medians of each, so they add up to about `total`"""
    hits: float
    misses: float
    in_time: float
    """of the hits: a prefetch had brought the expert, and this is its first use"""
    late: float
    """of the misses: a prefetch was under way"""
    wasted: float
    """prefetches given up, or evicted unused"""

    @property
    def tokens_per_s(self) -> float:
        return 1e3 / self.total

    def sentence(self) -> str:
        """One line for a reader."""
        return (
            f"{self.total:.3g} ms per token (median of {self.tokens}): expert kernels {self.kernels:.3g}, waiting "
            f"{self.waiting:.3g}, other {self.total - self.kernels - self.waiting:.3g}; experts per token: "
            f"{self.hits:.3g} present ({self.in_time:.3g} of them fetched ahead in time), {self.misses:.3g} awaited "
            f"({self.late:.3g} of them fetched ahead but late), {self.wasted:.3g} fetched for nothing"
        )


def summarise(recording: Recording) -> Summary:
    """The figures of a recording of at least one token."""
    shares = [token.shares() for token in recording.timeline]
    times = {name: statistics.median(getattr(s, name) for s in shares) for name in Shares.__dataclass_fields__}
    counts = {name: value / len(shares) for name, value in recording.counts.items()}
    return Summary(
        tokens=len(shares),
        **times,
        hits=counts["hits"],
        misses=counts["misses"],
        in_time=counts["prefetch_hits"],
        late=counts["prefetches_late"],
        wasted=counts["prefetches_wasted"],
    )
