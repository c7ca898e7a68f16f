"""Guesses about the first layer, which no gate input comes before: its router mostly repeats what it chose for the same
token the last time (token-id table; 76 % recall on the bundled model)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pyengine.native import ModelInfo, NativeEngine
from pyengine.traces.routing_log import Prompt, RoutingLog, Token

#: Rows are added in steps of so many token ids.
_STEP = 4096


class FirstLayer:
    """Learns from tokens computed one at a time, and names the experts before the next computation.

    Args:
        table: int16 [n_token_id, n_expert_used], -1 where nothing is known, from an earlier run; None: begin empty.

    Attributes:
        table: what is known now.
    """

    def __init__(
        self, native: NativeEngine, info: ModelInfo, log: RoutingLog, table: npt.NDArray[np.int16] | None
    ) -> None:
        self._native = native
        self._n_used = info.n_expert_used
        self._next: int | None = None  # the token that is being computed alone
        empty = np.zeros((0, info.n_expert_used), np.int16)
        self.table: npt.NDArray[np.int16] = empty if table is None else table.copy()
        log.listen(self)

    def before(self, tokens: Sequence[int]) -> None:
        """These token ids are computed next, together."""
        self._next = tokens[0] if len(tokens) == 1 else None
        if len(tokens) == 1:
            token = tokens[0]
            if 0 <= token < len(self.table) and self.table[token, 0] >= 0:
                self._native.expect(0, self.table[token].tolist(), keep=False)
            return
        ids = np.asarray(tokens)
        ids = ids[(ids >= 0) & (ids < len(self.table))]
        known = self.table[ids]
        known = known[known >= 0]
        if len(known):
            chosen = np.bincount(known)
            order = np.argsort(-chosen, kind="stable")
            self._native.expect(0, order[chosen[order] > 0].tolist(), keep=False)

    def token(self, token: Token) -> None:
        number, self._next = self._next, None
        if number is None or number < 0:
            return
        if number >= len(self.table):
            rows = (number // _STEP + 1) * _STEP - len(self.table)
            self.table = np.concatenate([self.table, np.full((rows, self._n_used), -1, np.int16)])
        self.table[number] = token.ids[0]

    def prompt(self, prompt: Prompt) -> None:
        pass
