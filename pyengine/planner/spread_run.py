"""Steps of a loaded model in which every layer spreads its tokens evenly over the same number of experts.

Like pyengine.planning.controlled_run, for many tokens: the engine's replay takes expert ids from us in the place of the
router's. So many tokens on all experts of a layer are what a batch is like: kernels are chosen by the number of tokens
and of rows to an expert, and passes, gathered rows and reads are as many as they will be.
"""

from __future__ import annotations

import ctypes
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import llama_cpp
import numpy as np
import psutil
from llama_cpp import _internals

from pyengine.planning.shape import ModelShape

if TYPE_CHECKING:
    from pyengine import Llama


#: A step is quiet if the hypervisor took no more than that share of a processor meanwhile; tries for each.
_STOLEN, _TRIES = 0.1, 2


@dataclass(frozen=True)
class SpreadStep:
    """One computation of equal tokens. Seconds, and experts that were missing; of all layers together."""

    wall: float
    kernels: float
    stall: float
    io: float
    """with at least one load under way"""
    misses: int

    @property
    def working(self) -> float:
        """Not waiting for experts."""
        return max(0.0, self.wall - self.stall)


class SpreadRun:
    """Args: a model with policy "lru" and look_ahead "off", and its shape."""

    def __init__(self, llm: Llama, shape: ModelShape) -> None:
        assert llm.engine is not None
        self._llm = llm
        self._native = llm.engine.native
        self._n_layer = shape.info.n_layer
        self._n_used = shape.info.n_expert_used
        self._n_expert = min(c.n_expert for c in shape.classes)
        self._token = max(0, llm.token_bos())
        #: Of a step.
        self.most_tokens = min(llm.n_batch, int(llm.n_ctx()) - 1)
        self.width = self.spread(self._n_expert)

    def spread(self, width: int, first: int = 0) -> int:
        """From now on tokens use that many experts of each layer in turn, from number `first` on, as far as there are
        so many; returned is how many it is."""
        self.width = max(self._n_used, min(width, self._n_expert))
        n_turn = self.width // math.gcd(self.width, self._n_used)
        ids = (np.arange(n_turn * self._n_used, dtype=np.int32) % self.width + first) % self._n_expert
        self._native.set_replay(np.repeat(ids.reshape(n_turn, 1, self._n_used), self._n_layer, axis=1))
        return self.width

    def tokens(self, rows: float) -> int:
        """Of a step in which each expert has so many rows."""
        return max(1, round(rows * self.width / self._n_used))

    def crowd(self, tokens: int, sequences: int) -> int:
        """Let other sequences have cells of the KV cache, from now on, so many tokens each, as far as there is room;
        returned is how many cells that are. They are copies: a state of llama.cpp is restored into new cells."""
        llm = self._llm
        room = (int(llm.n_ctx()) - tokens) // tokens
        self.step(tokens)
        context = llm.ctx
        state = (ctypes.c_uint8 * llama_cpp.llama_state_seq_get_size(context, 0))()
        size = llama_cpp.llama_state_seq_get_data(context, state, len(state), 0)
        done = 0
        while (
            size and done < min(sequences, room) and llama_cpp.llama_state_seq_set_data(context, state, size, done + 1)
        ):
            done += 1
        return done * tokens

    def alone(self) -> None:
        """No other sequence has cells any more."""
        self._llm._ctx.kv_cache_seq_rm(-1, 0, -1)

    def samples(self, tokens: int, n: int, *, all_outputs: bool = False) -> list[SpreadStep]:
        """Steps of a kind, from which the hypervisor took no processor time, if it lets us have two such; n of these,
        or fewer after some tries."""
        taken: list[SpreadStep] = []
        quiet: list[SpreadStep] = []
        while len(quiet) < n and len(taken) < _TRIES * n:
            before = _stolen()
            taken.append(self.step(tokens, all_outputs=all_outputs))
            if _stolen() - before <= _STOLEN * taken[-1].wall:
                quiet.append(taken[-1])
        return quiet if len(quiet) >= 2 else taken

    def step(self, tokens: int, *, all_outputs: bool = False) -> SpreadStep:
        """A prompt of so many tokens in an empty sequence, the logits of its last token or of all wanted."""
        llm = self._llm
        llm.n_tokens = 0
        llm._ctx.kv_cache_seq_rm(0, 0, -1)
        batch = _internals.LlamaBatch(n_tokens=tokens, embd=0, n_seq_max=1, verbose=False)
        try:
            batch.set_batch([self._token] * tokens, 0, all_outputs)
            before = llm.expert_stats()
            started = time.perf_counter()
            llm._ctx.decode(batch)
            wall = time.perf_counter() - started
            after = llm.expert_stats()
        finally:
            batch.close()  # type: ignore[no-untyped-call]

        def of(name: str) -> float:
            return float(after[name] - before[name])

        return SpreadStep(
            wall, of("compute_seconds"), of("stall_seconds"), of("io_seconds"), int(of("misses") + of("prefetch_hits"))
        )


def _stolen() -> float:
    """Seconds that other virtual machines had of our processors, so far; 0 where the system does not tell."""
    return float(getattr(psutil.cpu_times(), "steal", 0.0))
