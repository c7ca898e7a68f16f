"""A machine with nothing wrong with it, to be spoiled by tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pyengine import bundled_model
from pyengine.diagnosis.patient import Patient
from pyengine.planning.link import LinkSpeed
from pyengine.planning.shape import read_shape

Spoil = Callable[..., Patient]

#: Files of /proc and /sys of a healthy machine of four cores.
HEALTHY = {
    "proc/meminfo": "MemTotal: 16000000 kB\nSwapTotal: 0 kB\nSwapFree: 0 kB",
    "proc/loadavg": "0.10 0.20 0.30 1/200 4711",
    "proc/cpuinfo": "processor : 0\nflags : fpu avx2 avx512f",
    "proc/self/cgroup": "0::/user.slice",
    "proc/self/mountinfo": "21 1 8:1 / / rw - ext4 /dev/sda1 rw",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_driver": "acpi-cpufreq",
    "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never",
    "sys/fs/cgroup/user.slice/cpu.max": "max 100000",
    "sys/dev/block/8:1/queue/rotational": "0",
}


@pytest.fixture
def patient(tmp_path: Path) -> Spoil:
    """patient({file: content or None}, **parts): a healthy machine but for these."""

    def spoiled(files: dict[str, str | None] | None = None, **parts: Any) -> Patient:
        for name, content in (HEALTHY | (files or {})).items():
            path = tmp_path / "root" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is not None:
                path.write_text(content + "\n")
        gib = 1 << 30
        healthy = Patient(
            model=bundled_model(),
            shape=read_shape(bundled_model()),
            proc=tmp_path / "root" / "proc",
            sys=tmp_path / "root" / "sys",
            dev=tmp_path / "root" / "dev",
            environ={},
            cache=tmp_path / "cache",
            memory_limit=lambda: 16 * gib,
            memory_total=lambda: 16 * gib,
            memory_available=lambda: 12 * gib,
            address_limit=lambda: None,
            allowed_cores=lambda: 4,
            devices=list,
            link=lambda _: LinkSpeed(25e9, 1e-5),
            built_for_gpu=lambda: False,
        )
        return replace(healthy, **parts)

    return spoiled
