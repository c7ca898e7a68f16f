"""Looks on while a model computes, and tells a Refiner what every step was: through the engine's routing log and the
Llama's observers, so whoever steps need not know."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import TYPE_CHECKING

from pyengine.planner.refine import Refiner, StepRecord
from pyengine.traces.routing_log import Prompt, Token

if TYPE_CHECKING:
    from pyengine import Llama

#: A pause that is no part of a step: nobody computed, seconds.
_PAUSE_S = 5.0


class StepWatch:
    """Watches from when it is made until stop().

    Whoever computes several texts tells before each step, by `next_step`, what it will be; a step that was not told is
    taken as the decoding of as many texts as it has tokens.

    Args:
        llm: with managed experts.
        kinds: (texts that decode, tokens of prompts) of the steps that are told to the refiner; None: all.

    Attributes:
        last: the last step that was told to the refiner. Its time is from the end of the step before to its own end, as
            throughput counts it.
    """

    def __init__(self, llm: Llama, refiner: Refiner, kinds: Collection[tuple[int, int]] | None = None) -> None:
        assert llm.engine is not None
        self._llm, self._refiner, self._kinds = llm, refiner, kinds
        self.last: StepRecord | None = None
        self._told: tuple[int, int | None, float] | None = None
        self._tokens = 0
        self._micro_batches = 0
        self._on = True
        self._before = llm.expert_stats()
        self._last = time.perf_counter()
        llm.engine.routing_log.listen(self)
        llm.observers.append(self._after)

    def next_step(self, sequences: int, chunk: int | None, cells: float) -> None:
        """The next computation decodes a token of each of so many texts and computes `chunk` tokens of prompts (None:
        all tokens that it has beyond those), with so many KV cells in use."""
        self._told = (sequences, chunk, cells)

    def stop(self) -> None:
        """Look no longer. Harmless when repeated."""
        self._on = False
        if self._after in self._llm.observers:
            self._llm.observers.remove(self._after)

    # ---- of the routing log, before the observers

    def token(self, token: Token) -> None:
        self._tokens += 1
        self._micro_batches += 1

    def prompt(self, prompt: Prompt) -> None:
        self._tokens += prompt.tokens
        self._micro_batches += 1

    def _after(self) -> None:
        now, stats = time.perf_counter(), self._llm.expert_stats()
        wall, self._last = now - self._last, now
        before, self._before = self._before, stats
        tokens, self._tokens = self._tokens, 0
        micro_batches, self._micro_batches = self._micro_batches, 0
        told, self._told = self._told, None
        if not self._on or micro_batches != 1 or wall > _PAUSE_S + stats["stall_seconds"] - before["stall_seconds"]:
            return  # several times through all layers: no step as the plan means it
        sequences, chunk, cells = told if told is not None else (tokens, 0, 0.0)
        if chunk is None:
            chunk = tokens - sequences
        if chunk < 0 or (self._kinds is not None and (sequences, chunk) not in self._kinds):
            return

        def of(name: str) -> float:
            return float(stats[name] - before[name])

        missing = of("misses")
        self.last = StepRecord(
            sequences=sequences,
            chunk=chunk,
            cells=cells,
            wall_s=wall,
            compute_s=of("compute_seconds"),
            stall_s=of("stall_seconds"),
            io_s=of("io_seconds"),
            wanted=int(of("hits") + missing),
            missing=int(missing),
            loaded=int(missing + of("prefetch_hits")),
        )
        self._refiner.observe(self.last)
