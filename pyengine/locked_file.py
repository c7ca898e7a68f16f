"""A file that one process at a time may write to."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable
from pathlib import Path


def open_locked(path: Path, opened: Callable[[], int]) -> int:
    """A descriptor of the file at `path` with an exclusive lock, which ends with the descriptor.

    Args:
        opened: opens `path`, making it if it is absent.

    Raises:
        BlockingIOError: another process has the lock.
    """
    while True:
        descriptor = opened()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last owner may have removed or replaced it between our two calls.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
