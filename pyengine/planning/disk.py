"""How fast the disk gives experts: direct reads at random places of the model file itself, as the engine makes them."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

#: As many as the native engine's I/O threads.
THREADS = 4
_ALIGN = 4096
_HUGE_PAGE = 2 << 20
_SECONDS = 0.6
_ALONE_SECONDS = 0.25


@dataclass(frozen=True)
class DiskSpeed:
    bytes_per_s: float
    """with several reads under way"""
    latency_s: float
    """of one read alone, median"""
    record_bytes: int
    direct: bool
    """False: the file system has no direct reads, so these may have come from memory"""


def measure_disk(path: Path, record_bytes: int, seconds: float = _SECONDS) -> DiskSpeed:
    """Read records of `record_bytes` at random aligned places for about so long. Raises OSError."""
    descriptor, direct = _open(path)
    try:
        size = min(-(-record_bytes // _ALIGN) * _ALIGN, max(_ALIGN, os.fstat(descriptor).st_size // _ALIGN * _ALIGN))
        places = max(1, (os.fstat(descriptor).st_size - size) // _ALIGN + 1)
        alone = _reads(descriptor, size, places, min(_ALONE_SECONDS, seconds), seed=0)
        results: list[list[float]] = [[] for _ in range(THREADS)]

        def run(n: int) -> None:
            results[n] = _reads(descriptor, size, places, seconds, seed=n + 1)

        threads = [threading.Thread(target=run, args=(n,)) for n in range(THREADS)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.perf_counter() - started
        count = sum(len(r) for r in results)
        if not count or not alone:
            raise OSError(f"{path}: no record could be read")
        return DiskSpeed(count * size / took, float(np.median(alone)), size, direct)
    finally:
        os.close(descriptor)


def _open(path: Path) -> tuple[int, bool]:
    flag = getattr(os, "O_DIRECT", 0)
    if flag:
        try:
            return os.open(path, os.O_RDONLY | flag), True
        except OSError:
            pass
    return os.open(path, os.O_RDONLY), False


def _reads(descriptor: int, size: int, places: int, seconds: float, seed: int) -> list[float]:
    """Seconds of each read on this thread; empty if reading fails."""
    chance = np.random.default_rng(seed)
    took: list[float] = []
    # As the engine's slots: private huge pages, all there. With shared small ones large reads are half as fast.
    whole = -(-size // _HUGE_PAGE) * _HUGE_PAGE
    with mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as buffer:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a wish
                buffer.madvise(mmap.MADV_HUGEPAGE)
        buffer.write(bytes(whole))
        with memoryview(buffer) as view, view[:size] as target:
            end = time.perf_counter() + seconds
            while (before := time.perf_counter()) < end:
                try:
                    got = os.preadv(descriptor, [target], int(chance.integers(places)) * _ALIGN)
                except OSError:
                    return took
                if got <= 0:
                    return took
                took.append(time.perf_counter() - before)
    return took


def can_read_directly(paths: Sequence[Path]) -> bool:
    """Whether all files can be read past the page cache."""
    for path in paths:
        try:
            descriptor, direct = _open(path)
        except OSError:
            return False
        os.close(descriptor)
        if not direct:
            return False
    return True
