"""Refusing a busy machine, emptying caches, and what goes on beside a sample."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pyengine.bench import quiet
from pyengine.bench.quiet import CpuClock, drop_caches, fixed_work, other_programs, refuse_busy_machine, touch_memory
from pyengine.errors import UsageError


def test_a_busy_machine_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(quiet, "other_programs", lambda seconds: [(0.9, "make, process 7"), (0.2, "cc1, process 8")])
    with pytest.raises(UsageError, match=r"use 110% of a processor, the busiest is make, process 7 \(90%\).*--force"):
        refuse_busy_machine()


def test_a_quiet_machine_is_not(monkeypatch):
    monkeypatch.setattr(quiet, "other_programs", lambda seconds: [(0.01, "init, process 1")])
    assert refuse_busy_machine() == 0.01


def test_other_programs_are_seen_and_we_are_not():
    spinner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        use = {name: share for share, name in other_programs(1.0)}
    finally:
        spinner.kill()
        spinner.wait()
    [mine] = [share for name, share in use.items() if name.endswith(f"process {spinner.pid}")]
    assert mine > 0
    assert not any(name.endswith(f"process {os.getpid()}") for name in use)


def test_others_are_all_but_ours():
    before, after = CpuClock(busy=100.0, stolen=1.0, at=50.0), CpuClock(busy=130.0, stolen=3.0, at=60.0)
    assert after.others_since(before, ours=25.0) == (0.5, 0.2)
    # Clocks of different grain may make it a little negative.
    assert after.others_since(before, ours=31.0)[0] == 0.0


def test_caches_of_the_files_are_dropped_without_root(tmp_path, monkeypatch):
    monkeypatch.setattr(quiet, "_DROP", tmp_path / "no such folder" / "drop_caches")
    dropped = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda descriptor, *rest: dropped.append((os.fstat(descriptor).st_ino, rest))
    )
    file = tmp_path / "model.gguf"
    file.write_bytes(b"x")
    assert drop_caches([file]) == "posix_fadvise"
    assert dropped == [(file.stat().st_ino, (0, 0, os.POSIX_FADV_DONTNEED))]


def test_caches_of_the_system_are_dropped_with_root(tmp_path, monkeypatch):
    monkeypatch.setattr(quiet, "_DROP", tmp_path / "drop_caches")
    assert drop_caches([tmp_path / "not looked at"]) == "drop_caches"
    assert (tmp_path / "drop_caches").read_text() == "3"


def test_fixed_work_takes_longer_when_there_is_more(monkeypatch):
    little = min(fixed_work(1) for _ in range(3))
    monkeypatch.setattr(quiet, "_WORK_ROUNDS", 10 * quiet._WORK_ROUNDS)
    assert fixed_work(1) > little


def test_memory_is_touched_up_to_what_is_free(monkeypatch):
    assert touch_memory(130 << 20) == 128 << 20

    class Little:
        available = 100 << 20

    monkeypatch.setattr(quiet.psutil, "virtual_memory", lambda: Little)
    assert touch_memory(10 << 30) == 64 << 20
