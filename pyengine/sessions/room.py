"""Who has KV cells: which waiting session may begin, what makes room, and who gives way when there is none left."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from pyengine.sessions.cells import KvCells
from pyengine.sessions.continuation import Continuation
from pyengine.sessions.prefixes import PrefixCache, common


class Room:
    """
    Args:
        share: cells that a session can count on, if its prompt leaves some of them: what it grows by beyond may cost
            younger ones their place.
    """

    def __init__(self, cells: KvCells, prefixes: PrefixCache | None, share: int) -> None:
        self._cells = cells
        self._prefixes = prefixes
        self._share = share

    def begin(self, one: Continuation, active: Collection[Continuation]) -> bool:
        """Give it a sequence, with what is known of its beginning, if there is room. False: it must wait."""
        cells = self._cells
        source, shared = self._known(one, active)
        ours = [other.sequence for other in active]
        kept = () if self._prefixes is None else self._prefixes.sequences
        if not cells.free_sequences and not kept:
            return False
        n_prompt = len(one.tokens)
        # Some tokens may be generated already; the last one is never computed.
        growth = max(0, one.most_tokens - len(one.session.tokens) - 1)
        one.reserve = min(cells.n_cells, n_prompt + min(growth, max(self._share - n_prompt, self._share // 4)))
        promised = sum(max(0, other.reserve - other.computed) for other in active)
        already = cells.held_of(source, shared, ours) if shared else 0
        if active and one.reserve - already > cells.n_cells - cells.held(ours) - promised:
            return False
        if not cells.free_sequences:
            # Sharing needs a sequence, too: should the source be what is evicted, nothing is shared.
            assert self._prefixes is not None
            if shared:
                self._prefixes.used(source)
            self._prefixes.evict()
            if source not in ours and source not in self._prefixes.sequences:
                shared = 0
        if shared:
            one.sequence, one.computed = cells.share(source, shared), shared
            if self._prefixes is not None:
                self._prefixes.used(source)
        else:
            one.sequence, one.computed = cells.take(), 0
        return True

    def awaited(self, one: Continuation, active: Collection[Continuation]) -> bool:
        """Whether a session is computing what this one begins with: it waits, and shares it."""
        if self._prefixes is None or not self._cells.cuts:
            return False
        ids = one.ids
        known = self._known(one, active)[1]
        longest = max((min(common(other.ids, ids), len(ids) - 1) for other in active if other.pending > 1), default=0)
        return longest - known >= self._prefixes.least_tokens

    def make(self, active: Sequence[Continuation], n_tokens: int) -> list[Continuation]:
        """Free so many cells, if need be of the youngest sessions, which are returned and begin again later. The oldest
        one stays."""
        gone: list[Continuation] = []
        while self._cells.free < n_tokens:
            if self._prefixes is not None and self._prefixes.evict():
                continue
            left = [one for one in active if one not in gone]
            if len(left) < 2:
                break
            youngest = max(left, key=lambda one: one.number)
            self.give_back(youngest)
            gone.append(youngest)
        return gone

    def keep(self, one: Continuation) -> None:
        """Let others begin with what it has computed."""
        if self._prefixes is not None:
            self._prefixes.keep(one.sequence, one.tokens[: one.computed])

    def give_back(self, one: Continuation) -> None:
        """It needs its cells no longer, or must do without."""
        if one.sequence >= 0:
            self._cells.release(one.sequence)
        one.sequence, one.computed = -1, 0
        if self._prefixes is not None:
            self._prefixes.limit()

    def _known(self, one: Continuation, active: Collection[Continuation]) -> tuple[int, int]:
        """The sequence that has its beginning, and how much of it."""
        if self._prefixes is None:
            return -1, 0
        running = ((other.sequence, np.asarray(other.tokens[: other.computed], np.int32)) for other in active)
        return self._prefixes.match(one.ids, running)
