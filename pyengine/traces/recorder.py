"""Records the routing of a running model from its engine's events."""

from __future__ import annotations

import time
from collections import deque
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pyengine.native import EVENT, ModelInfo, NativeEngine
from pyengine.traces.trace import Prompts, Trace, TracedModel, TraceError

#: Kinds of pye_event that are accesses: the first ones.
_ACCESSES = 2

#: Tokens kept; of a longer run the last ones.
MOST_TOKENS = 1 << 16

_MOST_PAIRS = (1 << 16) - 1


class _Prompt(NamedTuple):
    at: int
    tokens: int
    counts: npt.NDArray[np.int64]
    """int64 [n_layer]: distinct experts"""
    experts: npt.NDArray[np.uint16]
    pairs: npt.NDArray[np.uint16]


class TraceRecorder:
    """Takes an engine's events after every computation. Nobody else may take them meanwhile.

        llm.observers.append(recorder.drain)

    Args:
        native: the engine, of which the accesses from now on are recorded.
        model_path: only its name is kept.
    """

    def __init__(self, native: NativeEngine, model_path: Path) -> None:
        self._native = native
        self._info: ModelInfo = native.info
        self._name = model_path.name
        self._tokens: deque[npt.NDArray[np.uint16]] = deque(maxlen=MOST_TOKENS)
        self._seconds: deque[float] = deque(maxlen=MOST_TOKENS)
        self._n_token = 0
        self._starts: list[int] = []
        self._prompts: list[_Prompt] = []
        self._lost = native.stats()["events_lost"]
        self._drop()
        self._last = time.perf_counter()

    def drain(self) -> None:
        """Take what happened since the last call: whole computations, one or more micro-batches."""
        now = time.perf_counter()
        took, self._last = now - self._last, now
        events = self._events()
        lost = self._native.stats()["events_lost"]
        if lost != self._lost:  # a computation with holes says nothing reliable
            self._lost = lost
            return
        accesses = events[events["kind"] < _ACCESSES]
        firsts = np.flatnonzero(np.diff(accesses["step"], prepend=-1))
        n_layer = self._info.n_layer
        if not len(firsts) or len(firsts) % n_layer:  # aborted in the middle
            return
        bounds = np.append(firsts, len(accesses))[::n_layer]
        for begin, end in pairwise(bounds):
            self._micro_batch(accesses[begin:end], took)

    def _micro_batch(self, accesses: npt.NDArray[np.void], took: float) -> None:
        n_layer, n_used = self._info.n_layer, self._info.n_expert_used
        pairs = accesses["tokens"].astype(np.int64)
        if len(accesses) == n_layer * n_used and int(pairs.max()) == 1:
            self._tokens.append(accesses["expert"].reshape(n_layer, n_used).astype("<u2"))
            self._seconds.append(took)
            self._n_token += 1
            return
        # Hits come before misses; a layer's experts are kept ascending.
        order = np.lexsort((accesses["expert"], accesses["layer"]))
        self._prompts.append(
            _Prompt(
                self._n_token,
                # llama.cpp drops tokens without output before the last layer's FFN: the first layer has them all.
                int(pairs[accesses["layer"] == 0].sum()) // n_used,
                np.bincount(accesses["layer"], minlength=n_layer),
                accesses["expert"][order].astype("<u2"),
                np.minimum(pairs[order], _MOST_PAIRS).astype("<u2"),
            )
        )
        if not self._starts or self._starts[-1] != self._n_token:
            self._starts.append(self._n_token)

    def trace(self) -> Trace:
        """What was recorded. Raises TraceError if that is nothing."""
        if not self._tokens and not self._prompts:
            raise TraceError("nothing was computed, so there is no routing to write")
        info = self._info
        first = self._n_token - len(self._tokens)
        prompts = [prompt for prompt in self._prompts if prompt.at >= first]
        shape = (len(self._tokens), info.n_layer, info.n_expert_used)
        return Trace(
            TracedModel(self._name, info.architecture, info.n_layer, info.n_expert, info.n_expert_used),
            ids=np.array(self._tokens, "<u2").reshape(shape),
            starts=np.array([s - first for s in self._starts if s >= first], "<i8"),
            prompts=Prompts(
                at=np.array([p.at - first for p in prompts], "<i8"),
                tokens=np.array([p.tokens for p in prompts], "<i8"),
                offsets=np.concatenate([[0], *(p.counts for p in prompts)]).cumsum().astype("<i8"),
                experts=np.concatenate([np.zeros(0, "<u2"), *(p.experts for p in prompts)]),
                pairs=np.concatenate([np.zeros(0, "<u2"), *(p.pairs for p in prompts)]),
            ),
            seconds=np.array(self._seconds, "<f4"),
        )

    def _drop(self) -> None:
        while len(self._native.events()):
            pass

    def _events(self) -> npt.NDArray[np.void]:
        """All events there are. A decode step has few: the first small piece is usually all."""
        parts, capacity = [], 4096
        while True:
            part = self._native.events(capacity)
            parts.append(part)
            if len(part) < capacity:
                return np.concatenate(parts) if len(parts) > 1 else part.astype(EVENT, copy=False)
            capacity = 1 << 16
