"""Reading and writing large aligned pieces of a file past the page cache, where the file system allows it."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def opened(path: Path, flags: int, *, direct: bool = True) -> Iterator[int]:
    """A descriptor, closed when the block ends; past the page cache if `direct` and the file system can.

    Raises OSError."""
    descriptor = open_file(path, flags, direct=direct)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_file(path: Path, flags: int, *, direct: bool = True) -> int:
    """As opened(); the caller closes it."""
    if direct and hasattr(os, "O_DIRECT"):
        try:
            return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system without direct access
                raise
    return os.open(path, flags | os.O_CLOEXEC, 0o666)


def aligned_buffer(n_bytes: int) -> memoryview:
    """Writable memory that begins at a page, as direct access wants it."""
    return memoryview(mmap.mmap(-1, n_bytes))


def read_into(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` from the file; the bytes that were there to read. Raises OSError."""
    done = 0
    while done < len(buffer):
        n = os.preadv(descriptor, [buffer[done:]], offset + done)
        if n == 0:
            break
        done += n
    return done


def write_all(descriptor: int, content: memoryview | bytes | bytearray, offset: int) -> None:
    """Write all of it at `offset`. Raises OSError."""
    rest = memoryview(content)
    while rest:
        n = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[n:], offset + n


def drop_cached(descriptor: int) -> None:
    """Let the system forget its copy of the file in memory, as far as it is on disk."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
