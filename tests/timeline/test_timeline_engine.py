"""What a real engine records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from pyengine import Llama, bundled_model
from pyengine.advice.foresight import look_ahead
from pyengine.bench.child import LoadedModel
from pyengine.native import SPAN, NativeEngine
from pyengine.timeline.recording import Recording, record
from pyengine.timeline.spans import ADOPTED, GIVEN_UP, Kind, Spans, of_kind
from pyengine.timeline.summary import summarise

N_TOKEN = 6
_MISS, _PREFETCH = 1, 3


class _Watched:
    """A subject that takes the engine's events apart: before and while the timeline is on."""

    def __init__(self, llm: Llama) -> None:
        self._inner = LoadedModel(llm, None)
        self.begin, self.likeliest, self.counters = self._inner.begin, self._inner.likeliest, self._inner.counters
        self._native: NativeEngine = llm.engine.native
        self.events: list[np.ndarray] = []

    def eval(self, tokens: list[int]) -> None:
        self._inner.eval(tokens)
        self.events.append(self._native.events())


@pytest.fixture(scope="module")
def recorded() -> Iterator[tuple[Recording, np.ndarray, int]]:
    """A recording, the events of its tokens, the number of layers."""
    # Other policies, and the first layer's guesses, take the events themselves.
    llm = Llama(ram_budget="40%", policy="lru", look_ahead="off", n_ctx=256, n_threads=2, n_threads_batch=2)
    look_ahead(llm.engine.native, llm.engine.info, bundled_model(), "fate")
    try:
        watched = _Watched(llm)
        recording = record(watched, llm.engine.native, llm.tokenize(b"The lighthouse keeper"), 8, N_TOKEN)
        yield recording, np.concatenate(watched.events[-N_TOKEN:]), llm.engine.info.n_layer
    finally:
        llm.close()


def _inside(inner: np.void, outer: Spans) -> bool:
    return bool(((outer["begin_ns"] <= inner["begin_ns"]) & (outer["end_ns"] >= inner["end_ns"])).any())


def test_spans_nest(recorded: tuple[Recording, np.ndarray, int]) -> None:
    recording, _, n_layer = recorded
    spans = recording.timeline.spans
    assert spans.dtype == SPAN and (spans["end_ns"] >= spans["begin_ns"]).all()
    assert Counter(of_kind(spans, Kind.FFN)["layer"].tolist()) == dict.fromkeys(range(n_layer), N_TOKEN)
    for kind in (Kind.COMPUTE, Kind.STALL):
        mine = of_kind(spans, kind)
        assert len(mine), f"no {kind.name}"
        for span in mine:
            outer = of_kind(spans, Kind.FFN)
            assert _inside(span, outer[outer["layer"] == span["layer"]])
        assert (mine["begin_ns"][1:] >= mine["end_ns"][:-1]).all(), "one thread does one thing at a time"
    for token in recording.timeline:
        assert of_kind(token.spans, Kind.FFN)["layer"].tolist() == list(range(n_layer))
    tokens = recording.timeline.tokens
    assert all(_covered(tokens, span) for span in of_kind(spans, Kind.FFN))


def _covered(tokens: np.ndarray, span: np.void) -> bool:
    return bool(((tokens[:, 0] <= int(span["begin_ns"])) & (tokens[:, 1] >= int(span["end_ns"]))).any())


def test_every_miss_has_its_load(recorded: tuple[Recording, np.ndarray, int]) -> None:
    recording, events, _ = recorded
    spans = recording.timeline.spans
    misses = Counter((int(e["layer"]), int(e["expert"])) for e in events if e["kind"] == _MISS)
    demands = of_kind(spans, Kind.DEMAND)
    landed = demands[(demands["flags"] & GIVEN_UP) == 0]
    assert misses and Counter((int(s["layer"]), int(s["expert"])) for s in landed) == misses
    adopted = int(((landed["flags"] & ADOPTED) != 0).sum())
    assert recording.counts["misses"] == len(landed) and recording.counts["prefetches_late"] == adopted
    assert len(of_kind(spans, Kind.PREFETCH)), "nothing was fetched ahead"


def test_shares_and_counts_agree_with_the_spans(recorded: tuple[Recording, np.ndarray, int]) -> None:
    recording, events, _ = recorded
    for token in recording.timeline:
        shares = token.shares()
        computing = of_kind(token.spans, Kind.COMPUTE)
        assert shares.kernels == pytest.approx(int((computing["end_ns"] - computing["begin_ns"]).sum()) / 1e6)
        assert 0 < shares.kernels < shares.total and shares.other > 0 and shares.engine >= 0
    summary = summarise(recording)
    assert summary.tokens == N_TOKEN
    assert (summary.hits + summary.misses) * N_TOKEN == pytest.approx(sum(e["kind"] <= _MISS for e in events))
    assert f"{summary.waiting:.3g}" in summary.sentence()


def test_nothing_is_recorded_unless_asked_for() -> None:
    with_timeline = Llama(ram_budget="40%", n_ctx=256)
    try:
        native = with_timeline.engine.native
        with_timeline.eval(with_timeline.tokenize(b"A"))
        assert len(native.take_timeline()) == 0
        native.set_timeline(True)
        with_timeline.eval([1])
        assert len(native.take_timeline()) > 0
        with_timeline.eval([1])
        native.set_timeline(True)  # forgets
        assert len(native.take_timeline()) == 0
    finally:
        with_timeline.close()
