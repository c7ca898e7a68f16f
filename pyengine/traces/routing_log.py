"""What the routers of a running model choose, told to everybody who wants to know, after every computation."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pyengine.native import EVENT, NativeEngine

#: Kinds of pye_event that are accesses: the first ones.
_ACCESSES = 2

#: Tokens taken from the engine's recording at once; it keeps no more rows than that of the largest models.
_TOKENS = 64

#: Computations after which a pause ends: the engine's memory of them is not endless.
_MOST_PENDING = 32


class Token(NamedTuple):
    """A token computed alone."""

    ids: npt.NDArray[np.uint16]
    """uint16 [n_layer, n_expert_used], in the router's order"""
    weights: npt.NDArray[np.float16]
    """float16 [n_layer, n_expert_used]: their routing weights; 0 where the engine does not see them"""
    inputs: npt.NDArray[np.float16]
    """float16 [n_layer, n_embd]: gate inputs; n_embd is 0 unless a listener wants them"""
    seconds: float
    """since the computation before"""


class Prompt(NamedTuple):
    """A micro-batch of several tokens."""

    tokens: int
    counts: npt.NDArray[np.int64]
    """int64 [n_layer]: distinct experts"""
    experts: npt.NDArray[np.uint16]
    """uint16 [sum of counts]: layer after layer, ascending in each"""
    pairs: npt.NDArray[np.int64]
    """int64 likewise: tokens that chose each"""
    shares: tuple[int, ...] = ()
    """tokens of each text in the computation that this is part of, if they are several; empty: one text, or unknown"""
    seconds: float = 0.0
    """since the computation before; of several micro-batches an equal part"""


class Listener(Protocol):
    def token(self, token: Token) -> None:
        """A token was computed alone."""

    def prompt(self, prompt: Prompt) -> None:
        """A micro-batch of several tokens was computed."""


class RoutingLog:
    """Takes an engine's events and recording. Nobody else may take them.

    Costs nothing until somebody listens; then some tens of microseconds after each computation, and what the listeners
    take.

    Args:
        pause: seconds for which tokens may wait to be told together; where a token takes a few milliseconds, telling
            each at once would be a good part of it.

    Attributes:
        more: while listeners are told of a token: whether another follows at once.
    """

    def __init__(self, native: NativeEngine, pause: float = 0.0) -> None:
        self._native = native
        self._pause = pause
        self._pending = 0  # computations that nobody has been told of
        self.more = False
        self._info = native.info
        self._listeners: list[Listener] = []
        self._inputs = False
        self._shares: tuple[int, ...] = ()
        self._last = time.perf_counter()

    def listen(self, listener: Listener, *, inputs: bool = False) -> None:
        """Tell `listener` from the next computation on. `inputs`: gate inputs too."""
        self._inputs = self._inputs or inputs
        self._native.set_recording(ids=True, inputs=self._inputs)
        while len(self._native.events()):  # what was before
            pass
        self._lost = self._native.stats()["events_lost"]
        self._listeners.append(listener)
        self._last = time.perf_counter()

    @contextlib.contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Who begins to listen inside is told nothing if something fails there."""
        n = len(self._listeners)
        try:
            yield
        except BaseException:
            del self._listeners[n:]
            raise

    def expect(self, shares: Sequence[int]) -> None:
        """The next computation has so many tokens of each of some texts. Only who computes them together knows."""
        self.flush()
        self._shares = tuple(shares) if len(shares) > 1 else ()

    def drain(self) -> None:
        """Call after every computation, on its thread."""
        shares, self._shares = self._shares, ()
        if not self._listeners:
            return
        self._pending += 1
        if shares or self._pending >= _MOST_PENDING or time.perf_counter() - self._last >= self._pause:
            self._tell(shares)

    def flush(self) -> None:
        """Tell what waits to be told together. Only while nobody computes."""
        if self._pending:
            self._tell(())

    def _tell(self, shares: tuple[int, ...]) -> None:
        now = time.perf_counter()
        since, self._last = now - self._last, now
        took, self._pending = since / self._pending, 0
        info = self._info
        tokens = [
            Token(*parts, took)
            for parts in zip(*self._native.take_recording(_TOKENS, info, inputs=self._inputs), strict=True)
        ]
        events = self._events()
        accesses = events[events["kind"] < _ACCESSES]
        if len(accesses) != len(tokens) * info.n_layer * info.n_expert_used:
            prompts = self._prompts(accesses)
            n_token = len(tokens) + sum(prompt.tokens for prompt in prompts)
            if sum(shares) != n_token:  # of a computation that failed, say
                shares = ()
            part = since / max(1, len(prompts) + len(tokens))
            for prompt in prompts:
                for listener in self._listeners:
                    listener.prompt(prompt._replace(shares=shares, seconds=part))
        # A micro-batch of one token is the last of its computation.
        for i, token in enumerate(tokens):
            self.more = i + 1 < len(tokens)
            for listener in self._listeners:
                listener.token(token)

    def _prompts(self, accesses: npt.NDArray[np.void]) -> list[Prompt]:
        lost = self._native.stats()["events_lost"]
        if lost != self._lost:  # a computation with holes says nothing reliable
            self._lost = lost
            return []
        n_layer, n_used = self._info.n_layer, self._info.n_expert_used
        layers = accesses["layer"].astype(np.int64)
        firsts = np.flatnonzero(np.diff(layers, prepend=n_layer) < 0)
        if n_layer == 1:
            firsts = np.flatnonzero(np.diff(accesses["step"], prepend=-1))
        ends = np.append(firsts[1:], len(accesses))
        deepest = int(layers.max(initial=0))  # some models have layers that are never computed
        prompts = []
        for begin, end in zip(firsts, ends, strict=True):
            part = accesses[begin:end]
            if int(part["layer"].max()) < deepest:
                continue  # aborted in the middle
            # Hits come before misses; and a layer whose matrices are computed apart comes more than once.
            part = part[np.unique(part["layer"].astype(np.int64) << 16 | part["expert"], return_index=True)[1]]
            pairs = part["tokens"].astype(np.int64)
            # llama.cpp drops tokens without output before the last layer's FFN: the first layer has them all.
            n_token = int(pairs[part["layer"] == part["layer"].min()].sum()) // n_used
            if n_token < 2:
                continue
            counts = np.bincount(part["layer"], minlength=n_layer)
            prompts.append(Prompt(n_token, counts, part["expert"].astype("<u2"), pairs))
        return prompts

    def _events(self) -> npt.NDArray[np.void]:
        """All events there are. A decode step has few: the first small piece is usually all."""
        parts, capacity = [], 4096
        while True:
            part = self._native.events(capacity)
            parts.append(part)
            if len(part) < capacity:
                return np.concatenate(parts) if len(parts) > 1 else part.astype(EVENT, copy=False)
            capacity = 1 << 16
