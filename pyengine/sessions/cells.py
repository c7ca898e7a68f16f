"""llama.cpp's sequences, and how many KV cells they hold. Sequences that share a prefix share its cells: llama.cpp
knows for each cell who uses it, but tells nobody how many are in use, so that is counted here."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import llama_cpp

import pyengine
from pyengine.errors import UsageError


class _Stretch:
    """Consecutive cells of one text, and the sequences that have them."""

    __slots__ = ("holders", "length")

    def __init__(self, length: int, holders: set[int]) -> None:
        self.length = length
        self.holders = holders


class KvCells:
    """All sequences of a model's context; empties it when made.

    Attributes:
        n_cells: there are; n_sequences: there can be; used: cells in use.
        cuts: whether a sequence can be shared up to any of its tokens (attention), or only as it is (recurrent state).
    """

    def __init__(self, llama: pyengine.Llama) -> None:
        self._llama = llama
        self.n_cells = int(llama.n_ctx())
        self.n_sequences = int(llama_cpp.llama_n_seq_max(llama.ctx))
        self.cuts = not (
            llama_cpp.llama_model_is_recurrent(llama.model) or llama_cpp.llama_model_is_hybrid(llama.model)
        )
        self._window = int(llama_cpp.llama_model_n_swa(llama.model))
        self._free = list(range(self.n_sequences))
        self._stretches: dict[int, list[_Stretch]] = {}
        self.used = 0
        with self.using():
            self._empty()
        self.done()

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """Inside, this thread computes with the model or changes its memory. Raises UsageError if another one does.
        Until done() no other thread may begin a text of its own."""
        with self._llama._user.computing(self):
            yield

    def close(self) -> None:
        """Empty the context, if the model is still open, for whoever uses it next."""
        with contextlib.suppress(UsageError), self.using():
            self._empty()
        self.done()

    def done(self) -> None:
        """No text is under way."""
        self._llama._user.finished(self)

    @property
    def free(self) -> int:
        """Cells."""
        return self.n_cells - self.used

    @property
    def free_sequences(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """A new, empty sequence. Raises IndexError: there is none."""
        sequence = self._free.pop(0)
        self._stretches[sequence] = []
        return sequence

    def length(self, sequence: int) -> int:
        """Tokens of a sequence."""
        return sum(stretch.length for stretch in self._stretches[sequence])

    def held(self, sequences: Collection[int]) -> int:
        """Cells that at least one of these has."""
        seen = {id(stretch): stretch for sequence in sequences for stretch in self._stretches[sequence]}
        return sum(stretch.length for stretch in seen.values())

    def held_of(self, source: int, n_tokens: int, sequences: Collection[int]) -> int:
        """Of the first cells of `source`, how many at least one of these has, too."""
        among, count = set(sequences), 0
        for stretch in self._stretches[source]:
            if n_tokens <= 0:
                break
            if among & stretch.holders:
                count += min(n_tokens, stretch.length)
            n_tokens -= stretch.length
        return count

    def only_of(self, sequences: Collection[int]) -> int:
        """Cells that nobody but these has."""
        among = set(sequences)
        seen = {id(stretch): stretch for sequence in among for stretch in self._stretches[sequence]}
        return sum(stretch.length for stretch in seen.values() if stretch.holders <= among)

    def extend(self, sequence: int, n_tokens: int) -> None:
        """So many tokens of the sequence were computed."""
        stretches = self._stretches[sequence]
        if stretches and stretches[-1].holders == {sequence}:
            stretches[-1].length += n_tokens
        else:
            stretches.append(_Stretch(n_tokens, {sequence}))
        self.used += n_tokens

    def shareable(self, source: int, n_tokens: int) -> int:
        """How many of the first `n_tokens` of `source` a new sequence could begin with."""
        have = self.length(source)
        if not self.cuts:
            return have if have <= n_tokens else 0
        n_tokens = min(n_tokens, have)
        # A sliding window forgets what its last token no longer sees, and an earlier one still would.
        first = llama_cpp.llama_memory_seq_pos_min(self._memory, source)
        return n_tokens if first <= max(0, n_tokens - self._window) or n_tokens == have else 0

    def share(self, source: int, n_tokens: int) -> int:
        """A new sequence that begins as `source` does; no cell is copied. `n_tokens` must be shareable. Raises
        IndexError: there is no sequence left."""
        sequence = self.take()
        llama_cpp.llama_memory_seq_cp(self._memory, source, sequence, 0, n_tokens if self.cuts else -1)
        self._split(source, n_tokens)
        for stretch in self._stretches[source]:
            if n_tokens <= 0:
                break
            stretch.holders.add(sequence)
            self._stretches[sequence].append(stretch)
            n_tokens -= stretch.length
        return sequence

    def roll_back(self, sequence: int) -> bool:
        """A computation was given up: leave of the sequence what was told to extend(). False: that cannot be, release
        it."""
        return bool(llama_cpp.llama_memory_seq_rm(self._memory, sequence, self.length(sequence), -1))

    def release(self, sequence: int) -> None:
        """The sequence ends; cells that others have stay."""
        llama_cpp.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        for stretch in self._stretches.pop(sequence):
            stretch.holders.discard(sequence)
            if not stretch.holders:
                self.used -= stretch.length
        self._free.append(sequence)
        self._free.sort()

    def _split(self, sequence: int, n_tokens: int) -> None:
        """See to it that a stretch ends after so many tokens of the sequence."""
        for stretch in self._stretches[sequence]:
            if n_tokens < stretch.length:
                break
            n_tokens -= stretch.length
        else:
            return
        if n_tokens == 0:
            return
        rest = _Stretch(stretch.length - n_tokens, set(stretch.holders))
        stretch.length = n_tokens
        for holder in rest.holders:
            theirs = self._stretches[holder]
            theirs.insert(theirs.index(stretch) + 1, rest)

    def _empty(self) -> None:
        llama_cpp.llama_memory_clear(self._memory, True)
        self._llama.reset()  # type: ignore[no-untyped-call]

    @property
    def _memory(self) -> Any:
        """llama_memory_t. Raises UsageError: the model is closed."""
        return self._llama._ctx.memory
