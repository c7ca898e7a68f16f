"""Decodes some tokens while the engine notes when what happens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pyengine.bench.measuring import Subject
from pyengine.timeline.spans import Spans, Timeline

if TYPE_CHECKING:
    from pyengine.native import NativeEngine

_COUNTERS = ("hits", "misses", "prefetch_hits", "prefetches_late", "prefetches_wasted")


@dataclass(frozen=True, eq=False)
class Recording:
    """A timeline, and what was counted during its tokens."""

    timeline: Timeline
    counts: dict[str, int]
    """hits, misses, prefetch_hits, prefetches_late, prefetches_wasted, as in pye_stats"""


def record(subject: Subject, native: NativeEngine, prompt: Sequence[int], warm_up: int, n_token: int) -> Recording:
    """Compute a prompt, decode `warm_up` tokens, then record `n_token` more. Greedy; does not end at an end of text."""
    subject.begin(0, len(prompt) + warm_up + n_token)
    subject.eval(prompt)
    for _ in range(warm_up):
        subject.eval([subject.likeliest()])
    following = subject.likeliest()
    before = native.stats()
    found: list[Spans] = []
    bounds = []
    # The engine counts from inside this call, by the clock that perf_counter_ns() reads too (CLOCK_MONOTONIC).
    origin = time.perf_counter_ns()
    native.set_timeline(True)
    try:
        for _ in range(n_token):
            begin = time.perf_counter_ns()
            subject.eval([following])
            following = subject.likeliest()
            bounds.append((begin - origin, time.perf_counter_ns() - origin))
            found.append(native.take_timeline())  # before its memory is full
    finally:
        native.set_timeline(False)
    counts = {name: native.stats()[name] - before[name] for name in _COUNTERS}
    # Loads of the last token that have not landed yet are in no picture.
    return Recording(Timeline(np.concatenate(found), np.array(bounds, np.int64).reshape(-1, 2)), counts)
