"""A loaded model whose tokens use the experts we choose.

Which experts are missing is controlled, not hoped for: the engine's replay takes expert ids from us in the place of the
router's, and the slots are those of one token. So the same ids again miss nothing, and others miss as many as they
differ in. The text is meaningless, the movement and the kernels are real.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pyengine.planning.shape import ModelShape

if TYPE_CHECKING:
    from pyengine import Llama

#: Sets of missing experts that come in turn. By the time one comes again it has left its slots; and that it comes again
#: is as in real decoding, where many misses are of experts read before: a virtual disk's host has them in its cache.
_SETS = 3

#: Samples of one kind, as far as they fit into as many seconds; at least two.
_SAMPLES = 12
_SAMPLES_S = 1.0


@dataclass(frozen=True)
class Step:
    """One computation: seconds, and what the engine counted meanwhile."""

    wall: float
    stall: float
    kernels: float
    misses: int
    bytes_read: int

    @property
    def other(self) -> float:
        """Seconds outside of expert kernels and of waiting for experts."""
        return max(0.0, self.wall - self.kernels - self.stall)


def budget_of_one_token(shape: ModelShape) -> int:
    """Bytes of slots for the experts of one token, and one slot more in each class against rounding."""
    info = shape.info
    one_token = -(-info.n_expert_used * info.n_layer * info.slot_bytes // info.n_experts_total)
    return min(info.slot_bytes, one_token + info.least_budget)


class ControlledRun:
    """Args: a model with slots for budget_of_one_token, with policy "lru" and look_ahead "off"; and its shape."""

    def __init__(self, llm: Llama, shape: ModelShape) -> None:
        assert llm.engine is not None
        self._llm = llm
        self._native = llm.engine.native
        self.n_used = shape.info.n_expert_used
        self._token = max(0, llm.token_bos())
        self._experts = min(c.n_expert for c in shape.classes)
        self._turn = 0
        self.n_layer = shape.info.n_layer
        self._use(np.arange(self.n_used))
        #: Most experts of a layer that two sets can differ in.
        self.most_missing = min(self.n_used, self._experts - self.n_used)
        bundle = llm.expert_stats()["bundle"]
        #: The bundle that experts are read from, None if it is the model's file.
        self.bundle = Path(bundle) if bundle else None

    @property
    def n_past(self) -> int:
        """Tokens of context."""
        return int(self._llm.n_tokens)

    def decode(self, missing: int, n_past: int) -> Step:
        """One token after `n_past` tokens, of which `missing` experts of every layer are others than last time."""
        self._exchange(missing)
        self.forget(n_past)
        return self._compute(1)

    def prompt(self, n: int, missing: int) -> Step:
        """A prompt of n equal tokens; every layer uses as many experts as one token does, `missing` of them new."""
        self._exchange(missing)
        self.forget(0)
        return self._compute(n)

    def more(self, n: int) -> Step:
        """n tokens more, with the experts of last time."""
        return self._compute(n)

    def forget(self, n_past: int) -> None:
        """Keep only so many tokens of context."""
        self._llm.n_tokens = n_past
        self._llm._ctx.kv_cache_seq_rm(-1, n_past, -1)

    def samples(self, take: Callable[[], Step]) -> list[Step]:
        """Several of a kind, after some that find the traces of what came before."""
        for _ in range(_SETS):
            take()
        taken: list[Step] = []
        end = time.perf_counter() + _SAMPLES_S
        while len(taken) < _SAMPLES and (len(taken) < 2 or time.perf_counter() < end):
            taken.append(take())
        return taken

    def _exchange(self, missing: int) -> None:
        """From now on, tokens use a set of which so many experts were not in the last one; 0: the same set."""
        if missing:
            kept = self.n_used - missing
            self._turn += 1
            first = kept + self._turn % min(_SETS, (self._experts - kept) // missing) * missing
            self._use(np.r_[np.arange(kept), np.arange(first, first + missing)])

    def _use(self, experts: npt.NDArray[np.int64]) -> None:
        self._native.set_replay(np.tile(experts.astype(np.int32), (1, self.n_layer, 1)))

    def _compute(self, n: int) -> Step:
        before = self._llm.expert_stats()
        started = time.perf_counter()
        self._llm.eval([self._token] * n)
        wall = time.perf_counter() - started
        after = self._llm.expert_stats()

        def of(name: str) -> Any:
            return after[name] - before[name]

        return Step(wall, of("stall_seconds"), of("compute_seconds"), of("misses"), of("bytes_read"))
