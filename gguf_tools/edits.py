"""Copying a tensor's bytes with rows or columns added, in pieces of a few megabytes whatever its size.

Everything here works on bytes: a row of any ggml type is a whole number of bytes, and so is a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from gguf_tools.errors import ModelFileError
from gguf_tools.header import TensorEntry

#: Called with the number of bytes written since the last call.
Advance = Callable[[int], None]

#: Bytes in one piece. Large enough for a disk's full speed; a few of them are all the memory that copying takes.
PIECE = 8 << 20


@dataclass(frozen=True)
class Copy:
    """The tensor as it is."""

    def n_bytes(self, source: TensorEntry) -> int:
        return source.n_bytes

    def write(self, source: TensorEntry, file: BinaryIO, out: BinaryIO, advance: Advance) -> None:
        _repeat(file, source.offset, source.n_bytes, source.n_bytes, out, advance)


@dataclass(frozen=True)
class RepeatRows:
    """Every run of `old` bytes becomes one of `new` bytes by starting again from its first byte."""

    old: int
    new: int

    def n_bytes(self, source: TensorEntry) -> int:
        return source.n_bytes // self.old * self.new

    def write(self, source: TensorEntry, file: BinaryIO, out: BinaryIO, advance: Advance) -> None:
        for at in range(source.offset, source.offset + source.n_bytes, self.old):
            _repeat(file, at, self.old, self.new, out, advance)


@dataclass(frozen=True)
class AppendZeros:
    """Every row of `old` bytes becomes one of `new` bytes by zeros after it."""

    old: int
    new: int

    def n_bytes(self, source: TensorEntry) -> int:
        return source.n_bytes // self.old * self.new

    def write(self, source: TensorEntry, file: BinaryIO, out: BinaryIO, advance: Advance) -> None:
        n_rows = source.n_bytes // self.old
        at_once = max(1, min(n_rows, PIECE // self.new))
        wide = np.zeros((at_once, self.new), dtype=np.uint8)
        file.seek(source.offset)
        for start in range(0, n_rows, at_once):
            n = min(at_once, n_rows - start)
            rows = np.frombuffer(read_all(file, n * self.old), dtype=np.uint8)
            wide[:n, : self.old] = rows.reshape(n, self.old)
            out.write(wide[:n].data)
            advance(n * self.new)


Edit = Copy | RepeatRows | AppendZeros


def _repeat(file: BinaryIO, at: int, old: int, new: int, out: BinaryIO, advance: Advance) -> None:
    """Write the `old` bytes at `at` over and over until `new` are written."""
    if old == 0:
        return
    if old <= PIECE:
        file.seek(at)
        block = read_all(file, old)
        block *= max(1, min(PIECE, new) // old)  # large writes are fast ones
        view = memoryview(block)
        for start in range(0, new, len(block)):
            advance(out.write(view[: min(len(block), new - start)]))
        return
    done = 0
    while done < new:
        begin = done % old
        n = min(PIECE, old - begin, new - done)
        file.seek(at + begin)
        advance(out.write(read_all(file, n)))
        done += n


def read_all(file: BinaryIO, n: int) -> bytes:
    """Exactly n bytes. Raises ModelFileError when the file has become shorter meanwhile."""
    raw = file.read(n)
    if len(raw) != n:
        raise ModelFileError(f"{file.name} has changed while it was read")
    return raw
