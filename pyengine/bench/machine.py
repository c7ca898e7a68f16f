"""The record of the machine that a benchmark ran on: everything needed to judge its figures, no names and no paths."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from pyengine.cli import installed_version

#: Variables that change how the kernels' threads wait or where they run.
_VARIABLES = ("OMP_", "GOMP_", "KMP_", "GGML_")


def machine_record(model_folder: Path) -> dict[str, Any]:
    """JSON-able facts. `model_folder`: where the models lie, for the file system and its disk."""
    memory = psutil.virtual_memory()
    return {
        "cpu": cpu_model(),
        "cores": psutil.cpu_count(logical=False),
        "threads": psutil.cpu_count(),
        "usable_threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "cpu_flags": cpu_flags(),
        "hypervisor": "hypervisor" in _cpu_info().get("flags", ""),
        "governor": _first_line(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "memory_bytes": memory.total,
        "available_bytes": memory.available,
        "swap_bytes": psutil.swap_memory().total,
        "transparent_hugepages": _chosen(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "file_system": file_system(model_folder),
        "disk": disk(model_folder),
        "python": platform.python_version(),
        "pyengine": installed_version("pyengine"),
        "llama_cpp_python": installed_version("llama-cpp-python"),
        "built_for": _built_for(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)},
    }


def cpu_model() -> str:
    info = _cpu_info()
    return info.get("model name") or info.get("Hardware") or platform.processor() or "unknown"


def cpu_flags() -> list[str]:
    """The instruction sets that matter to the kernels, as the kernel names them."""
    known = ("avx2", "fma", "f16c", "avx_vnni", "avx512", "amx", "neon", "asimd", "sve", "i8mm", "dotprod")
    info = _cpu_info()
    flags = (info.get("flags") or info.get("Features") or "").split()
    return [flag for flag in flags if flag.startswith(known)]


def disk(folder: Path) -> dict[str, Any]:
    """The block device below a folder: whether it rotates, its scheduler and read-ahead; empty if there is none."""
    number = folder.stat().st_dev
    entry = Path("/sys/dev/block", f"{os.major(number)}:{os.minor(number)}")
    if not entry.exists():
        return {}
    entry = entry.resolve()
    if (entry / "partition").exists():
        entry = entry.parent
    queue = entry / "queue"
    return {
        "device": entry.name,
        "model": _first_line(entry / "device" / "model"),
        "rotates": _first_line(queue / "rotational") == "1",
        "scheduler": _chosen(queue / "scheduler"),
        "read_ahead_kb": _first_line(queue / "read_ahead_kb"),
    }


def file_system(folder: Path) -> str:
    """Its type, e.g. "ext4"."""
    real = folder.resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if real.is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "unknown"


def _built_for() -> str:
    from pyengine.native import built_for

    return built_for()


def _cpu_info() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo."""
    return dict(_cpu_lines())


def _cpu_lines() -> Iterator[tuple[str, str]]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        if not line.strip():
            return
        name, _, value = line.partition(":")
        yield name.strip(), value.strip()


def _chosen(path: Path) -> str | None:
    """The choice in brackets: "none [mq-deadline] kyber" is "mq-deadline"."""
    line = _first_line(path)
    return line.partition("[")[2].partition("]")[0] or line if line else None


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text().splitlines()[0].strip()
    except (OSError, IndexError):
        return None
