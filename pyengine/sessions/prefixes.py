"""Prompts that stay in KV cells after their session, so that the next one that begins alike need not compute them."""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt

import pyengine
from pyengine.errors import UsageError
from pyengine.sessions.cells import KvCells
from pyengine.sessions.fingerprint import fingerprint
from pyengine.sessions.prefix_file import PrefixFileError, SavedPrefix, read_prefix, write_prefix

Ids = npt.NDArray[np.int32]


class PrefixCache:
    """The prefixes of one Scheduler; give it one of its own. Least recently used ones make room, when a session needs
    their cells or their sequence, and when all of them have more than `max_cells`.

    Not for several threads: call save() and load() where the scheduler steps.

    Args:
        max_cells: KV cells that prefixes may have for themselves; None: half of all. More cells in use make attention
            slower for everybody.
        least_tokens: shorter prefixes are not worth keeping or waiting for.
    """

    def __init__(self, *, max_cells: int | None = None, least_tokens: int = 16) -> None:
        if (max_cells is not None and max_cells < 0) or least_tokens < 1:
            raise UsageError("max_cells must be at least 0 and least_tokens at least 1")
        self._max_cells = max_cells
        self.least_tokens = least_tokens
        self._kept: OrderedDict[int, Ids] = OrderedDict()  # by sequence, least recently used first
        self._llama: pyengine.Llama | None = None
        self._cells: KvCells | None = None

    def attach(self, llama: pyengine.Llama, cells: KvCells) -> None:
        """For Scheduler. Raises UsageError: another one has it."""
        if self._cells is not None:
            raise UsageError("this PrefixCache belongs to a Scheduler already; give each its own")
        self._llama, self._cells = llama, cells
        if self._max_cells is None:
            self._max_cells = cells.n_cells // 2

    def detach(self) -> None:
        """The scheduler closes: its context's cells are no longer ours."""
        self._kept.clear()
        self._llama = self._cells = None

    @property
    def sequences(self) -> tuple[int, ...]:
        """llama.cpp's ids of what is kept, least recently used first."""
        return tuple(self._kept)

    @property
    def prefixes(self) -> list[tuple[int, ...]]:
        """Token ids of what is kept, least recently used first."""
        return [tuple(tokens.tolist()) for tokens in self._kept.values()]

    def match(self, tokens: Ids, running: Iterable[tuple[int, Ids]] = ()) -> tuple[int, int]:
        """The sequence that a text can begin with, and how many of its tokens: fewer than all of them, since the last
        one must be computed. (-1, 0): none.

        Args:
            running: sequences that are not kept, and what they hold.
        """
        cells = self._attached()
        best = (-1, 0)
        for sequence, known in (*self._kept.items(), *running):
            n = cells.shareable(sequence, min(common(known, tokens), len(tokens) - 1))
            if n > best[1]:
                best = (sequence, n)
        return best if best[1] >= self.least_tokens else (-1, 0)

    def used(self, sequence: int) -> None:
        """A session has begun with it, if it is one that is kept."""
        if sequence in self._kept:
            self._kept.move_to_end(sequence)

    def keep(self, source: int, tokens: Sequence[int]) -> None:
        """Keep what a sequence holds, these tokens, if it is worth it and there is a sequence left."""
        cells = self._attached()
        ids = np.asarray(tokens, np.int32)
        if len(ids) < self.least_tokens or self._max_cells == 0:
            return
        for sequence, kept in list(self._kept.items()):
            same = common(kept, ids)
            if same == len(ids) and (cells.cuts or len(kept) == len(ids)):
                self.used(sequence)
                return
            if same == len(kept) and cells.cuts:  # only the beginning of the new one
                self._release(sequence)
        if not cells.free_sequences:
            if not self._kept:
                return
            self.evict()
        self._kept[cells.share(source, len(ids))] = ids
        self.limit()

    def evict(self) -> bool:
        """Give up the least recently used one. False: there is none."""
        if not self._kept:
            return False
        self._release(next(iter(self._kept)))
        return True

    def limit(self) -> None:
        """Give up what is more than max_cells; after a session that shared cells with a prefix has ended, too."""
        assert self._max_cells is not None
        while self._kept and self._attached().only_of(self.sequences) > self._max_cells:
            self.evict()

    def save(self, path: Path, tokens: Sequence[int]) -> int:
        """Write the state of a prefix that is kept to a file, whole or not at all.

        Args:
            tokens: a prefix that is kept, or its beginning. A request with max_tokens=0 makes one.

        Returns: bytes of state.

        Raises:
            UsageError: it is not kept.
            PrefixFileError: the file cannot be written.
        """
        cells, llama = self._attached(), self._opened()
        ids = np.asarray(tokens, np.int32)
        having = next((s for s, kept in self._kept.items() if common(kept, ids) == len(ids)), None)
        if having is None or cells.shareable(having, len(ids)) != len(ids) or not len(ids):
            raise UsageError(f"no prefix is kept that begins with these {len(ids)} tokens")
        with cells.using():
            cut = cells.length(having) != len(ids)
            sequence = self._cut(having, len(ids)) if cut else having
            try:
                size = llama_cpp.llama_state_seq_get_size(llama.ctx, sequence)
                state = (ctypes.c_uint8 * size)()
                written = llama_cpp.llama_state_seq_get_data(llama.ctx, state, size, sequence)
            finally:
                if cut:
                    cells.release(sequence)
        if written != size:
            raise UsageError("llama.cpp cannot save the state of this model")
        write_prefix(path, SavedPrefix(tuple(ids.tolist()), memoryview(state).cast("B")), fingerprint(llama))
        return int(size)

    def load(self, path: Path) -> tuple[int, ...]:
        """Take up a prefix from a file that save() wrote; it is kept as any other.

        Returns: its tokens.

        Raises:
            PrefixFileError: the file is unreadable or damaged, or belongs to another model or other settings.
            UsageError: there is no room for it now.
        """
        cells, llama = self._attached(), self._opened()
        saved = read_prefix(path, fingerprint(llama))
        n_tokens = len(saved.tokens)
        with cells.using():
            while self._kept and (cells.free < n_tokens or not cells.free_sequences):
                self.evict()
            if cells.free < n_tokens or not cells.free_sequences:
                raise UsageError(f"no room for the {n_tokens} tokens of {path} beside the sessions that run")
            sequence = cells.take()
            state = (ctypes.c_uint8 * len(saved.state)).from_buffer_copy(saved.state)
            read = llama_cpp.llama_state_seq_set_data(llama.ctx, state, len(state), sequence)
            last = llama_cpp.llama_memory_seq_pos_max(llama._ctx.memory, sequence)
            if read != len(state) or last != n_tokens - 1:
                cells.release(sequence)
                raise PrefixFileError(f"{path}: llama.cpp does not take the saved state")
            cells.extend(sequence, n_tokens)
        self._kept[sequence] = np.asarray(saved.tokens, np.int32)
        return saved.tokens

    def _cut(self, source: int, n_tokens: int) -> int:
        """The beginning of a kept sequence as one of its own."""
        cells = self._attached()
        if not cells.free_sequences:
            raise UsageError("all sequences are in use; save a whole prefix, or do it later")
        return cells.share(source, n_tokens)

    def _release(self, sequence: int) -> None:
        del self._kept[sequence]
        self._attached().release(sequence)

    def _attached(self) -> KvCells:
        if self._cells is None:
            raise UsageError("this PrefixCache has no Scheduler, or its Scheduler is closed")
        return self._cells

    def _opened(self) -> pyengine.Llama:
        assert self._llama is not None
        return self._llama


def common(a: Ids, b: Ids) -> int:
    """Tokens that both begin with."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
