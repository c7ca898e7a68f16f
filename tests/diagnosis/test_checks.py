"""Each check finds what is wrong with a made-up machine, names the remedy, and finds nothing on a healthy one."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pyengine import startup
from pyengine.diagnosis import gpu, machine, memory, software, storage
from pyengine.diagnosis.checks import CHECKS, examine
from pyengine.diagnosis.finding import Level
from pyengine.errors import StartupError
from pyengine.native import Device
from pyengine.planning import disk
from pyengine.planning.disk import DiskSpeed
from pyengine.planning.link import LinkSpeed

from .conftest import Spoil

GIB = 1 << 30
CARD = Device("CUDA0", "a card", "", 23 * GIB, 24 * GIB, gpu=True, unified=False)
SICK: dict[str, tuple[Any, Level, dict[str, str | None], dict[str, Any], str]] = {
    # name: check, level, files of /proc and /sys, other parts, what the finding says
    "swap in use": (
        memory.swap,
        Level.SLOW,
        {"proc/meminfo": "SwapTotal: 2097152 kB\nSwapFree: 1048576 kB"},
        {},
        "1 GiB in use",
    ),
    "swap enabled": (
        memory.swap,
        Level.NOTE,
        {"proc/meminfo": "SwapTotal: 2097152 kB\nSwapFree: 2097152 kB"},
        {},
        "2 GiB, unused",
    ),
    "a small container": (
        memory.memory,
        Level.FAIL,
        {},
        {"memory_limit": lambda: GIB, "memory_available": lambda: 50 << 20},
        "limited to 1 GiB",
    ),
    "room for less than a token": (
        memory.memory,
        Level.SLOW,
        {},
        {"memory_available": lambda: 140 << 20},
        "less than one token needs",
    ),
    "ulimit -v too small": (memory.address_limit, Level.FAIL, {}, {"address_limit": lambda: GIB}, "ulimit -v is 1 GiB"),
    "ulimit -v": (memory.address_limit, Level.NOTE, {}, {"address_limit": lambda: 64 * GIB}, "ulimit -v is 64 GiB"),
    "no huge pages": (
        machine.huge_pages,
        Level.NOTE,
        {"sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]"},
        {},
        "never",
    ),
    "one core": (machine.cores, Level.SLOW, {}, {"allowed_cores": lambda: 1}, "one core"),
    "a quota": (machine.cores, Level.SLOW, {"sys/fs/cgroup/user.slice/cpu.max": "150000 100000"}, {}, "a quota of 1.5"),
    "a quota of the older interface": (
        machine.cores,
        Level.SLOW,
        {
            "proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/docker/1",
            "sys/fs/cgroup/cpu/docker/1/cpu.cfs_quota_us": "50000",
            "sys/fs/cgroup/cpu/docker/1/cpu.cfs_period_us": "100000",
        },
        {},
        "a quota of 0.5",
    ),
    "powersave": (
        machine.governor,
        Level.SLOW,
        {"sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave"},
        {},
        "lowest frequency",
    ),
    "adaptive powersave": (
        machine.governor,
        Level.NOTE,
        {
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_driver": "intel_pstate",
        },
        {},
        "follows the load",
    ),
    "busy": (machine.busy, Level.SLOW, {"proc/loadavg": "3.50 1 1 1/1 1"}, {}, "load 3.50 on 4 cores"),
    "a thread limit": (machine.openmp, Level.SLOW, {}, {"environ": {"OMP_THREAD_LIMIT": "2"}}, "OMP_THREAD_LIMIT=2"),
    "active waiting": (machine.openmp, Level.SLOW, {}, {"environ": {"OMP_WAIT_POLICY": "ACTIVE"}}, "active"),
    "bound threads": (machine.openmp, Level.SLOW, {}, {"environ": {"OMP_PROC_BIND": "close"}}, "OMP_PROC_BIND=close"),
    "dynamic teams": (machine.openmp, Level.SLOW, {}, {"environ": {"OMP_DYNAMIC": "true"}}, "OMP_DYNAMIC"),
    "a GPU that this llama.cpp was not built for": (
        gpu.gpu,
        Level.SLOW,
        {"dev/nvidia0": ""},
        {},
        "a GPU of NVIDIA is there, and llama.cpp was built without one",
    ),
    "a GPU of the processor's": (
        gpu.gpu,
        Level.NOTE,
        {"sys/bus/pci/devices/0/class": "0x030000", "sys/bus/pci/devices/0/vendor": "0x8086"},
        {},
        "a GPU of Intel",
    ),
    "a GPU without its driver": (
        gpu.gpu,
        Level.SLOW,
        {"dev/nvidia0": ""},
        {"built_for_gpu": lambda: True},
        "built for GPUs but finds none",
    ),
    "a slow link": (
        gpu.gpu,
        Level.SLOW,
        {
            "sys/bus/pci/devices/0/class": "0x030200",
            "sys/bus/pci/devices/0/current_link_width": "4",
            "sys/bus/pci/devices/0/max_link_width": "16",
        },
        {"devices": lambda: [CARD], "link": lambda _: LinkSpeed(6.2e9, 1e-5)},
        "link 6.2 GB/s, slow: 4 of its 16 PCIe lanes",
    ),
    "VRAM in use": (
        gpu.gpu,
        Level.SLOW,
        {},
        {"devices": lambda: [replace(CARD, free_bytes=9 * GIB)]},
        "9 GiB free of 24 GiB: other programs have 15 GiB",
    ),
    "a network": (
        storage.file_system,
        Level.SLOW,
        {"proc/self/mountinfo": "21 1 0:50 / / rw - nfs4 host:/ rw"},
        {},
        "nfs4",
    ),
    "a rotating disk": (storage.file_system, Level.SLOW, {"sys/dev/block/8:1/queue/rotational": "1"}, {}, "rotating"),
    "memory as a disk": (
        storage.file_system,
        Level.NOTE,
        {"proc/self/mountinfo": "21 1 0:30 / / rw - tmpfs tmpfs rw"},
        {},
        "tmpfs",
    ),
}


@pytest.mark.parametrize("name", SICK)
def test_a_sick_machine(name: str, patient: Spoil) -> None:
    check, level, files, parts, says = SICK[name]
    assert check(patient()).level == Level.OK, "healthy without it"
    finding = check(patient(files, **parts))
    assert finding.level == level
    assert says in finding.found
    assert finding.remedy
    assert "\n" not in finding.found


@pytest.mark.parametrize(
    "files",
    [
        dict.fromkeys(("proc/meminfo", "proc/loadavg", "proc/cpuinfo", "proc/self/cgroup", "proc/self/mountinfo"), ""),
        dict.fromkeys(("proc/meminfo", "proc/loadavg", "proc/self/cgroup", "proc/self/mountinfo"), "nonsense\n\n: - :"),
    ],
    ids=["empty", "nonsense"],
)
def test_a_kernel_that_says_nothing_useful_worries_nobody(files: dict[str, str | None], patient: Spoil) -> None:
    spoiled = patient(files)
    for check in (memory.swap, machine.busy, machine.cores, storage.file_system, software.amx):
        assert check(spoiled).level == Level.OK


def test_without_a_proc_and_a_sys(patient: Spoil, tmp_path: Path) -> None:
    nowhere = patient(proc=tmp_path / "none", sys=tmp_path / "none")
    for check in (memory.swap, machine.busy, machine.cores, machine.governor, machine.huge_pages, storage.file_system):
        assert check(nowhere).level == Level.OK


def test_a_gpu_as_it_should_be(patient: Spoil) -> None:
    found = gpu.gpu(patient(devices=lambda: [CARD]))
    assert (found.level, found.found) == (Level.OK, "CUDA0 (a card), 23 GiB free, link 25 GB/s")
    board = replace(CARD, free_bytes=GIB, unified=True)
    assert "unified memory" in gpu.gpu(patient(devices=lambda: [board])).found
    assert gpu.gpu(patient(devices=lambda: [replace(CARD, gpu=False)])).found == "none"


def test_the_line_that_builds_llama_cpp_for_the_gpu_that_is_there(patient: Spoil) -> None:
    remedy = gpu.gpu(patient({"dev/nvidia0": ""})).remedy
    assert remedy.startswith('CMAKE_ARGS="-DGGML_CUDA=on ') and remedy.endswith(startup.LLAMA_CPP_PYTHON)


def test_a_virtual_disk_that_calls_itself_rotating(patient: Spoil, tmp_path: Path) -> None:
    device = tmp_path / "root/sys/devices/pci0000:00/virtio1/block/vda"
    (device / "queue").mkdir(parents=True)
    (device / "queue/rotational").write_text("1\n")
    link = tmp_path / "root/sys/dev/block/254:0"
    link.parent.mkdir(parents=True)
    link.symlink_to(device)
    found = storage.file_system(patient({"proc/self/mountinfo": "21 1 254:0 / / rw - ext4 /dev/vda rw"}))
    assert found.level == Level.OK and "virtual disk" in found.found


def test_the_disk_of_a_partition(patient: Spoil, tmp_path: Path) -> None:
    device = tmp_path / "root/sys/devices/pci0000:00/ata1/block/sdb"
    (device / "sdb1").mkdir(parents=True)
    (device / "queue").mkdir()
    (device / "queue/rotational").write_text("1\n")
    link = tmp_path / "root/sys/dev/block/8:17"
    link.parent.mkdir(parents=True)
    link.symlink_to(device / "sdb1")
    found = storage.file_system(patient({"proc/self/mountinfo": "21 1 8:17 / / rw - xfs /dev/sdb1 rw"}))
    assert found.level == Level.SLOW and "xfs on a rotating disk" in found.found


def test_the_innermost_mount_counts(patient: Spoil, tmp_path: Path) -> None:
    model = tmp_path / "with space" / "m.gguf"
    point = str(model.parent).replace(" ", "\\040")  # as the kernel writes it
    mounts = f"21 1 8:1 / / rw - ext4 /dev/sda1 rw\n22 21 0:9 / {point} rw - nfs h rw"
    assert "nfs" in storage.file_system(patient({"proc/self/mountinfo": mounts}, model=model)).found
    assert "ext4" in storage.file_system(patient({"proc/self/mountinfo": mounts}, model=tmp_path / "m.gguf")).found


def test_no_direct_reads(patient: Spoil, monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage.direct_reads(patient()).level == Level.OK
    real_open = os.open

    def refuse(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, *rest)

    monkeypatch.setattr(disk.os, "open", refuse)
    found = storage.direct_reads(patient())
    assert found.level == Level.SLOW and "no direct reads on ext4" in found.found


@pytest.mark.parametrize(("speed", "level"), [(50e6, Level.SLOW), (2e9, Level.OK)])
def test_disk_speed(speed: float, level: Level, patient: Spoil, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "measure_disk", lambda *_: DiskSpeed(speed, 1e-4, 65536, True))
    found = storage.disk_speed(patient())
    assert found.level == level and f"{speed / 1e6:.0f} MB/s in random reads of 64 KiB" in found.found


def test_an_installation_that_does_not_fit(patient: Spoil, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise StartupError(
            "pyengine is built for llama-cpp-python 9.\nThis line builds the right one:\n    pip install"
        )

    monkeypatch.setattr(startup, "check", refuse)
    found = software.versions(patient())
    assert (found.level, found.found) == (Level.FAIL, "pyengine is built for llama-cpp-python 9.")
    assert found.remedy == "This line builds the right one: pip install"
    assert software.model(patient(shape=None)).level == Level.NOTE, "nothing native is touched"


@pytest.mark.parametrize(("uses_it", "says"), [(True, "tried and work"), (False, "not used by llama.cpp")])
def test_amx(uses_it: bool, says: str, patient: Spoil, monkeypatch: pytest.MonkeyPatch) -> None:
    import llama_cpp

    monkeypatch.setattr(llama_cpp, "llama_print_system_info", lambda: f"AMX_INT8 = {int(uses_it)}".encode())
    assert says in software.amx(patient({"proc/cpuinfo": "flags : avx2 amx_tile amx_int8"})).found


def test_models(patient: Spoil, tmp_path: Path) -> None:
    assert "llama, 30 layers of 32 experts" in software.model(patient()).found
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF and nothing more")
    found = software.model(patient(model=damaged, shape=None))
    assert found.level == Level.FAIL and "damaged.gguf" in found.found


def test_a_cache_folder_that_cannot_be_written(patient: Spoil, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert storage.cache_folder(patient()).level == Level.OK
    file = tmp_path / "a file"
    file.touch()
    found = storage.cache_folder(patient(cache=file / "pyengine"))
    assert found.level == Level.SLOW and "XDG_CACHE_HOME" in found.remedy
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 0}))
    assert storage.cache_folder(patient()).level == Level.FAIL


def test_every_check_of_the_table_is_made(patient: Spoil, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "measure_disk", lambda *_: DiskSpeed(1e9, 1e-4, 65536, True))
    findings = dict(examine(patient()))
    assert list(findings) == list(CHECKS)
    assert {f.level for f in findings.values()} <= {Level.OK, Level.NOTE}
