"""What the system counts for this process: CPU seconds, those of pyengine's I/O threads, and bytes from the disk."""

from __future__ import annotations

import resource
from pathlib import Path

#: What pyengine's I/O threads are called (pthread_setname_np), cut to what the kernel keeps.
IO_THREAD = "pye-io"


def process_counters(proc: Path = Path("/proc/self")) -> dict[str, float]:
    """cpu_s (user and system, all threads), io_cpu_s (I/O threads only), disk_bytes (from storage, through the page
    cache or not; read-ahead and page faults included). What this system does not tell is left out."""
    use = resource.getrusage(resource.RUSAGE_SELF)
    counts = {"cpu_s": use.ru_utime + use.ru_stime}
    io_cpu = [_seconds_on_cpu(task) for task in _io_tasks(proc)]
    if io_cpu:
        counts["io_cpu_s"] = sum(io_cpu)
    try:
        lines = dict(line.split(": ") for line in (proc / "io").read_text().splitlines())
        counts["disk_bytes"] = float(lines["read_bytes"])
    except (OSError, ValueError, KeyError):
        pass
    return counts


def peak_resident(proc: Path = Path("/proc/self")) -> int | None:
    """Most bytes of RAM this process had at once, mapped pages of files included. (getrusage would tell its parent's
    peak if that was larger.)"""
    try:
        lines = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    except (OSError, ValueError, KeyError, IndexError):
        return None


def _io_tasks(proc: Path) -> list[Path]:
    found = []
    for task in (proc / "task").glob("*"):
        try:
            if (task / "comm").read_text().startswith(IO_THREAD):
                found.append(task)
        except OSError:  # it has ended
            continue
    return found


def _seconds_on_cpu(task: Path) -> float:
    try:
        return int((task / "schedstat").read_text().split()[0]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0
