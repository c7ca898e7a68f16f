"""Guesses about the first layer, which no gate input comes before: its router mostly repeats what it chose for the same
token the last time (token-id table; 76 % recall on the bundled model)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pyengine.advice.attribution import Attribution
from pyengine.native import ModelInfo, NativeEngine
from pyengine.traces.routing_log import Prompt, RoutingLog, Token

#: Rows are added in steps of so many token ids.
_STEP = 4096
#: Of more tokens together nobody can tell who chose what, and they need nearly everything.
_MOST_TOGETHER = 64
#: Tokens that wait to be told of, at most; see RoutingLog.
_MOST_PENDING = 64


class FirstLayer:
    """Learns from tokens computed one at a time, and from steps of several texts what their sums tell (attribution.py);
    names the experts before the next computation.

    Args:
        table: int16 [n_token_id, n_expert_used], -1 where nothing is known, from an earlier run; None: begin empty.

    Attributes:
        table: what is known now.
    """

    def __init__(
        self, native: NativeEngine, info: ModelInfo, log: RoutingLog, table: npt.NDArray[np.int16] | None
    ) -> None:
        self._native = native
        self._log = log
        self._n_used, self._n_expert = info.n_expert_used, info.n_expert
        self._alone: list[int] = []  # tokens computed alone that nobody has told of
        self._told: list[npt.NDArray[np.int16]] = []  # what such ones chose
        self._together: npt.NDArray[np.int64] = np.zeros(0, np.int64)  # those computed together last
        self._attribution = Attribution(info.n_expert, info.n_expert_used)
        empty = np.zeros((0, info.n_expert_used), np.int16)
        self.table: npt.NDArray[np.int16] = empty if table is None else table.copy()
        log.listen(self)

    def before(self, tokens: Sequence[int]) -> None:
        """These token ids are computed next, together."""
        if len(tokens) == 1:
            token = tokens[0]
            self._alone = [*self._alone[-_MOST_PENDING:], token]
            if 0 <= token < len(self.table) and self.table[token, 0] >= 0:
                self._native.expect(0, self.table[token].tolist(), keep=False)
            return
        self._alone = []  # what is told of after this may be the end of it
        ids = self._together = np.asarray(tokens, np.int64)
        ids = ids[(ids >= 0) & (ids < len(self.table))]
        known = self.table[ids]
        known = known[known >= 0]
        if len(known):
            chosen = np.bincount(known)
            order = np.argsort(-chosen, kind="stable")
            self._native.expect(0, order[chosen[order] > 0].tolist(), keep=False)

    def token(self, token: Token) -> None:
        self._told.append(token.ids[0].astype(np.int16))
        if self._log.more:
            return
        # The last are the same in both: a computation may have failed, or a prompt have ended in a part of one token.
        n = min(len(self._told), len(self._alone))
        for number, experts in zip(self._alone[len(self._alone) - n :], self._told[len(self._told) - n :], strict=True):
            if number >= 0:
                self._grow(number)
                self.table[number] = experts
                self._attribution.forget(number)
        self._alone, self._told = [], []

    def prompt(self, prompt: Prompt) -> None:
        tokens, self._together = self._together, np.zeros(0, np.int64)
        whole = len(tokens) == prompt.tokens <= _MOST_TOGETHER
        if not (prompt.shares and whole and prompt.counts[0] and (tokens >= 0).all()):
            return
        pairs = np.zeros(self._n_expert, np.int64)
        first = slice(0, int(prompt.counts[0]))
        pairs[prompt.experts[first]] = prompt.pairs[first]
        self._grow(int(tokens.max()))
        shares = self._attribution.add(tokens, pairs, self.table[tokens])
        self.table[tokens] = np.argsort(-shares, axis=1, kind="stable")[:, : self._n_used]

    def _grow(self, number: int) -> None:
        if number >= len(self.table):
            rows = (number // _STEP + 1) * _STEP - len(self.table)
            self.table = np.concatenate([self.table, np.full((rows, self._n_used), -1, np.int16)])
