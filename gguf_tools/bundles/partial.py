"""The file in which a bundle grows until it is whole: its lock, its checkpoints, and how it gets its name.

At a checkpoint the records so far are on disk before the tables say so; whatever interrupts the work later, it goes on
from there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from gguf_tools.bundles.file import drop_cached, open_file, write_all
from gguf_tools.bundles.format import MAGIC, BundleError, Tables, read_tables
from gguf_tools.errors import GgufToolsError, RequestError
from pyengine.bundles import SUFFIX, partial_of
from pyengine.locked_file import open_locked
from pyengine.whole_file import behind_links, stand_for, sync_folder


class BusyError(GgufToolsError):
    """Another process is making the same bundle."""


class PartialBundle:
    """Locked for this process from opened() to close().

    Attributes:
        tables: what the file will say in the end; `tables.n_done` and the checksums are of what it says now.
        descriptor: for aligned writes of records.
    """

    def __init__(self, target: Path, descriptor: int, tables: Tables) -> None:
        self.target = target
        self.path = partial_of(target)
        self.descriptor = descriptor
        self.tables = tables
        self._sync = open_file(self.path, os.O_RDWR, direct=False)

    def take_over(self) -> str | None:
        """Continue with what an earlier process left, or empty the file. The reason for the latter, if there was
        something, else None."""
        size = os.fstat(self._sync).st_size
        try:
            if not size:
                raise BundleError("it is empty")
            old = read_tables(self._sync)
            if not _agree(old, self.tables):
                raise BundleError("it is of another model, order, ggml or CPU")
        except BundleError as reason:
            os.ftruncate(self._sync, 0)
            return str(reason) if size else None
        self.tables.places["checksum"] = old.places["checksum"]
        self.tables.n_done = min(old.n_done, old.n_total)
        return None

    def allocate(self) -> None:
        """Take all the space the bundle needs. Raises RequestError if the disk has too little, OSError."""
        needed = self.tables.file_bytes
        missing = needed - os.fstat(self._sync).st_blocks * 512
        free = shutil.disk_usage(self.path.parent).free
        if missing > free:
            raise RequestError(
                f"{self.target} needs {needed:,} bytes, {missing:,} more than it has, and the disk has {free:,} free"
            )
        try:
            os.posix_fallocate(self._sync, 0, needed)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise RequestError(f"{self.target} needs {needed:,} bytes: {error.strerror}") from error
            os.ftruncate(self._sync, needed)  # a file system that cannot promise space

    def checkpoint(self, n_done: int) -> None:
        """Note on disk that the first n_done records are there. Raises OSError."""
        os.fdatasync(self._sync)
        drop_cached(self._sync)
        self.tables.n_done = n_done
        self.tables.seal()
        write_all(self._sync, self.tables.content, 0)
        os.fdatasync(self._sync)

    def finish(self) -> None:
        """All records are there: give the file its name. Raises OSError."""
        self.checkpoint(self.tables.n_total)
        target = behind_links(self.target)
        stand_for(target, self._sync)
        os.fsync(self._sync)
        os.replace(self.path, target)
        sync_folder(target.parent)

    def discard_if_empty(self) -> None:
        """Remove the file if nothing in it is worth keeping."""
        if not self.tables.n_done:
            with contextlib.suppress(OSError):
                self.path.unlink()

    def close(self) -> None:
        os.close(self._sync)


def check_replaceable(target: Path) -> None:
    """Raise RequestError if there is a file of that name which is not ours to replace."""
    if not target.exists():
        return
    if not target.is_file():
        raise RequestError(f"{target} is not a regular file")
    with target.open("rb") as file:
        begin = file.read(len(MAGIC))
    if begin != MAGIC and (begin.startswith(b"GGUF") or not target.name.endswith(SUFFIX)):
        raise RequestError(f"{target} is not a bundle; it was not replaced")


def _agree(old: Tables, new: Tables) -> bool:
    """Whether two bundles are the same but for what is written of them."""

    def plan(tables: Tables) -> bytes:
        blank = Tables(bytearray(tables.content))
        blank.header["checksum"] = blank.header["n_done"] = 0
        blank.places["checksum"] = 0
        return bytes(blank.content)

    return plan(old) == plan(new)


@contextlib.contextmanager
def opened(target: Path, tables: Tables) -> Iterator[PartialBundle]:
    """The unfinished file of a bundle, made if there is none, locked until the block ends.

    Raises:
        BusyError: another process has it.
        OSError: it cannot be made.
    """
    path = partial_of(target)
    descriptor = _locked(path, target)
    try:
        partial = PartialBundle(target, descriptor, tables)
        try:
            yield partial
        finally:
            partial.close()
    finally:
        os.close(descriptor)  # and with it the lock


def _locked(path: Path, target: Path) -> int:
    try:
        return open_locked(path, lambda: open_file(path, os.O_RDWR | os.O_CREAT))
    except BlockingIOError:
        raise BusyError(f"another process is making {target}") from None
