"""How quiet the machine is: refusing a busy one, empty caches before a cold run, and what went on during a sample."""

from __future__ import annotations

import hashlib
import mmap
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from pyengine.errors import UsageError

#: Processors' worth of other programs above which nothing is measured, and for how long they are watched, seconds.
BUSY, WATCH_S = 0.10, 2.0

_DROP = Path("/proc/sys/vm/drop_caches")
_WORK = bytes(1 << 20)
_WORK_ROUNDS = 100


@dataclass(frozen=True)
class CpuClock:
    """Processor seconds so far: busy (everyone's), stolen (by the hypervisor), and when, seconds."""

    busy: float
    stolen: float
    at: float

    @classmethod
    def now(cls) -> CpuClock:
        times = psutil.cpu_times()
        stolen = getattr(times, "steal", 0.0)
        # guest time is contained in user time already
        counted = sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq"))
        return cls(counted, stolen, time.monotonic())

    def others_since(self, before: CpuClock, ours: float) -> tuple[float, float]:
        """(processors' worth of other programs, processors' worth stolen) since `before`; `ours`: seconds to leave
        out."""
        wall = max(self.at - before.at, 1e-9)
        return max(0.0, self.busy - before.busy - ours) / wall, (self.stolen - before.stolen) / wall


def refuse_busy_machine() -> float:
    """Processors' worth of other programs, watched for WATCH_S.

    Raises:
        UsageError: more than BUSY; the message names the busiest.
    """
    use = other_programs(WATCH_S)
    total = sum(share for share, _ in use)
    if total > BUSY:
        share, name = use[0]
        raise UsageError(
            f"the machine is busy: other programs use {total:.0%} of a processor, the busiest is {name} ({share:.0%}); "
            "wait for them or measure anyway with --force"
        )
    return total


def other_programs(seconds: float) -> list[tuple[float, str]]:
    """(processors' worth, name and id) of every other process that ran in the next `seconds`, the busiest first."""
    before = _cpu_by_process()
    time.sleep(seconds)
    used = []
    for (pid, born), (name, cpu) in _cpu_by_process().items():
        share = (cpu - before.get((pid, born), (name, 0.0))[1]) / seconds
        if pid != os.getpid() and share > 0:
            used.append((share, f"{name}, process {pid}"))
    return sorted(used, reverse=True)


def _cpu_by_process() -> dict[tuple[int, float], tuple[str, float]]:
    found = {}
    for process in psutil.process_iter(["pid", "create_time", "name", "cpu_times"]):
        times = process.info["cpu_times"]
        if times is not None:
            key = (process.info["pid"], process.info["create_time"])
            found[key] = (process.info["name"] or "?", times.user + times.system)
    return found


def drop_caches(files: Iterable[Path]) -> str:
    """Forget cached pages, so that the next run starts cold: all of the system's as root, else those of `files`.

    Returns how: "drop_caches" or "posix_fadvise" (which spares pages that others use).
    """
    os.sync()
    try:
        _DROP.write_text("3")
        return "drop_caches"
    except OSError:
        pass
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return "posix_fadvise"


def fixed_work(n_thread: int) -> float:
    """Seconds that a fixed amount of work (about a fifth of a second) takes on `n_thread` threads: its spread over a
    benchmark says how steady the processors were."""

    def work() -> None:
        digest = hashlib.sha256()
        for _ in range(_WORK_ROUNDS):
            digest.update(_WORK)  # without Python's lock

    threads = [threading.Thread(target=work) for _ in range(n_thread)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started


def touch_memory(wanted: int) -> int:
    """Write to as many bytes of fresh memory as will be needed, as far as they are free, and give them back.

    Virtual machines often get their memory at its first touch only; whoever comes first would pay for it.
    """
    size = min(wanted, int(0.8 * psutil.virtual_memory().available))
    block = 64 << 20
    held = []
    try:
        for _ in range(size // block):
            held.append(mmap.mmap(-1, block))
            held[-1].write(b"\1" * block)
    except (OSError, ValueError):  # the system gives no more
        pass
    finally:
        for one in held:
            one.close()
    return len(held) * block
