"""What the engine recorded: stretches of time, and what follows from them for a token. Draws and writes nothing.

`Spans` are structured arrays with the fields of pye_span in pyengine.h: begin_ns, end_ns, kind, layer, expert, flags.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, IntEnum

import numpy as np
import numpy.typing as npt

Spans = npt.NDArray[np.void]


class Kind(IntEnum):
    """PYE_SPAN_* of pyengine.h."""

    COMPUTE = 0
    STALL = 1
    DEMAND = 2
    PREFETCH = 3
    PREDICT = 4
    FFN = 5


#: pye_span.flags
GIVEN_UP, ADOPTED = 1, 2

_LOADS = (Kind.DEMAND, Kind.PREFETCH)


class Load(Enum):
    """What became of a load."""

    DEMAND = "demand load"
    LATE = "prefetch, late"
    """the router named its expert before it had landed"""
    PREFETCH = "prefetch"
    GIVEN_UP = "given up"


def load_kind(span: np.void) -> Load:
    """What became of a load; `span` is one of loads()."""
    if span["flags"] & GIVEN_UP:
        return Load.GIVEN_UP
    if span["kind"] == Kind.PREFETCH:
        return Load.PREFETCH
    return Load.LATE if span["flags"] & ADOPTED else Load.DEMAND


def loads(spans: Spans) -> Spans:
    """Those that are loads, by begin."""
    return _by_begin(spans[np.isin(spans["kind"], _LOADS)])


def of_kind(spans: Spans, kind: Kind) -> Spans:
    """Those of one kind, by begin."""
    return _by_begin(spans[spans["kind"] == kind])


def _by_begin(spans: Spans) -> Spans:
    return spans[np.argsort(spans["begin_ns"], kind="stable")]


def lanes(spans: Spans) -> npt.NDArray[np.int64]:
    """For each span a lane in which no two overlap, as few lanes as possible, the lowest free one.

    Args:
        spans: by begin. One that begins when another ends may share its lane.
    """
    out = np.zeros(len(spans), np.int64)
    busy: list[tuple[int, int]] = []  # (end, lane)
    free: list[int] = []
    for i, (begin, end) in enumerate(zip(spans["begin_ns"].tolist(), spans["end_ns"].tolist(), strict=True)):
        while busy and busy[0][0] <= begin:
            heapq.heappush(free, heapq.heappop(busy)[1])
        out[i] = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (end, int(out[i])))
    return out


@dataclass(frozen=True)
class Shares:
    """Where a token's time went, ms; they add up to `total`."""

    total: float
    kernels: float
    waiting: float
    predicting: float
    engine: float
    """else inside expert FFNs: look-up, choosing victims, gathering rows"""
    other: float
    """attention, routers, sampling: everything but expert FFNs and predictors"""


@dataclass(frozen=True, eq=False)
class Timeline:
    """A few tokens decoded one after the other."""

    spans: Spans
    tokens: npt.NDArray[np.int64]
    """[n, 2]: begin and end of each token, ns on the spans' clock"""

    def __iter__(self) -> Iterator[Token]:
        return (self.token(i) for i in range(len(self.tokens)))

    def token(self, number: int) -> Token:
        begin, end = (int(t) for t in self.tokens[number])
        mine = self.spans[(self.spans["begin_ns"] < end) & (self.spans["end_ns"] > begin)]
        return Token(number, begin, end, mine)

    def typical(self) -> Token:
        """The token of median duration, of two the shorter one."""
        order = np.argsort(self.tokens[:, 1] - self.tokens[:, 0], kind="stable")
        return self.token(int(order[(len(order) - 1) // 2]))


@dataclass(frozen=True, eq=False)
class Token:
    """One token, and every span that touches its time: loads may have begun before or land later."""

    number: int
    begin_ns: int
    end_ns: int
    spans: Spans

    def shares(self) -> Shares:
        kernels, waiting, predicting = (self._covered(kind) for kind in ([Kind.COMPUTE], [Kind.STALL], [Kind.PREDICT]))
        inside = self._covered([Kind.FFN, Kind.COMPUTE, Kind.STALL, Kind.PREDICT])
        total = self.end_ns - self.begin_ns
        engine = inside - self._covered([Kind.COMPUTE, Kind.STALL, Kind.PREDICT])
        values = (total, kernels, waiting, predicting, engine, total - inside)
        return Shares(*(value / 1e6 for value in values))

    def _covered(self, kinds: list[Kind]) -> int:
        """ns of the token during which a span of these kinds is under way."""
        mine = _by_begin(self.spans[np.isin(self.spans["kind"], kinds)])
        covered, until = 0, self.begin_ns
        for begin, end in zip(mine["begin_ns"].tolist(), mine["end_ns"].tolist(), strict=True):
            begin, end = max(begin, until), min(end, self.end_ns)
            if end > begin:
                covered += end - begin
                until = end
        return covered
