"""Which pages of a file the system keeps in memory."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_PAGE = mmap.PAGESIZE


def drop(paths: Iterable[Path]) -> None:
    """Forget the pages of these files: the next read of each byte goes to the disk."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # pages that are not written back yet stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident(path: Path) -> NDArray[np.bool_]:
    """For each page of the file, whether it is in memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    size = path.stat().st_size
    pages = np.zeros(-(-size // _PAGE), np.uint8)
    with path.open("rb") as file:
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), f"cannot map {path}")
    try:
        if libc.mincore(address, size, pages.ctypes.data) != 0:
            raise OSError(ctypes.get_errno(), f"mincore of {path}")
    finally:
        libc.munmap(address, size)
    return (pages & 1).astype(bool)


def pages_within(offset: int, size: int) -> slice:
    """The pages that lie wholly within these bytes of a file."""
    return slice(-(-offset // _PAGE), (offset + size) // _PAGE)
