"""Control groups: both interfaces over folders that look like the kernel's, and real ones where we may make them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pyengine.bench import cgroups
from pyengine.bench.cgroups import CgroupError, DiskLimit, MemoryUse, groups
from pyengine.bench.launch import launch

DISK = DiskLimit("8:0", 200_000_000)


class FakeSystem:
    """A folder in the place of /sys/fs/cgroup. A group's files appear when they are written; the kernel would have made
    them. rmdir is the only thing that behaves otherwise there, so removing is recorded instead."""

    def __init__(self, root, monkeypatch):
        self.root = root / "cgroup"
        self.root.mkdir()
        self.removed = []
        self._membership = root / "membership"
        monkeypatch.setattr(cgroups, "_MEMBERSHIP", self._membership)
        monkeypatch.setattr(cgroups, "_remove", self.removed.append)

    def member_of(self, *lines):
        self._membership.write_text("".join(f"{line}\n" for line in lines))

    def folder(self, name, **files):
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (folder / file.replace("__", ".")).write_text(text)
        return folder


@pytest.fixture
def system(tmp_path, monkeypatch):
    return FakeSystem(tmp_path, monkeypatch)


@pytest.fixture
def v1(system):
    system.member_of("4:memory:/job/1", "7:blkio:/", "0::/")
    system.folder("memory/job/1")
    system.folder("blkio")
    return system


@pytest.fixture
def v2(system):
    """A login of systemd: processes are in a scope, controllers are handed on by the slice above it."""
    system.member_of("0::/user.slice/me.slice/shell.scope")
    system.folder("", cgroup__controllers="cpu memory io", cgroup__subtree_control="cpu memory io")
    system.folder("user.slice", cgroup__subtree_control="memory io")
    system.folder("user.slice/me.slice", cgroup__subtree_control="memory")
    system.folder("user.slice/me.slice/shell.scope", cgroup__subtree_control="")
    return system


def test_v1_limits_memory_below_our_own_group(v1):
    with groups(10**9, None, v1.root) as made:
        [folder] = made.folders
        assert folder.parent == v1.root / "memory" / "job" / "1"
        assert (folder / "memory.limit_in_bytes").read_text() == "1000000000"
        assert made.entrances == [folder / "cgroup.procs"]
    assert v1.removed == [folder]


def test_v1_limits_swap_too_where_it_is_counted(v1, monkeypatch):
    real = cgroups._make

    def make(*arguments):
        folder, version = real(*arguments)
        (folder / "memory.memsw.limit_in_bytes").write_text("")
        return folder, version

    monkeypatch.setattr(cgroups, "_make", make)
    with groups(10**9, None, v1.root) as made:
        assert (made.folders[0] / "memory.memsw.limit_in_bytes").read_text() == "1000000000"


def test_v1_limits_the_disk_in_a_tree_of_its_own(v1):
    with groups(10**9, DISK, v1.root) as made:
        memory, disk = made.folders
        assert disk.parent == v1.root / "blkio"
        assert (disk / "blkio.throttle.read_bps_device").read_text() == "8:0 200000000"
    assert v1.removed == [disk, memory]


def test_v1_tells_peak_and_kills(v1):
    with groups(10**9, None, v1.root) as made:
        folder = made.folders[0]
        (folder / "memory.max_usage_in_bytes").write_text("999\n")
        (folder / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
        (folder / "memory.failcnt").write_text("3\n")
        (folder / "memory.memsw.failcnt").write_text("4\n")
        assert made.memory_use() == MemoryUse(peak=999, kills=2, at_limit=7)


def test_v2_goes_up_to_a_group_that_hands_the_controller_on(v2):
    with groups(10**9, None, v2.root) as made:
        [folder] = made.folders
        assert folder.parent == v2.root / "user.slice" / "me.slice"
        assert (folder / "memory.max").read_text() == "1000000000"
        (folder / "memory.peak").write_text("999\n")
        (folder / "memory.events").write_text("low 0\nhigh 0\nmax 12\noom 1\noom_kill 1\n")
        assert made.memory_use() == MemoryUse(peak=999, kills=1, at_limit=12)


def test_v2_without_a_peak_says_so(v2):
    with groups(10**9, None, v2.root) as made:
        (made.folders[0] / "memory.events").write_text("max 0\noom_kill 0\n")
        assert made.memory_use() == MemoryUse(peak=None, kills=0, at_limit=0)


def test_v2_has_one_group_for_both(v2):
    with groups(10**9, DISK, v2.root) as made:
        [folder] = made.folders
        assert folder.parent == v2.root / "user.slice"  # me.slice has memory only
        assert (folder / "io.max").read_text() == "8:0 rbps=200000000"


def test_v2_without_the_disk_controller_is_an_error(v2):
    v2.folder("", cgroup__subtree_control="memory")
    v2.folder("user.slice", cgroup__subtree_control="memory")
    with pytest.raises(CgroupError, match="no group above this process hands on memory and io"):
        groups(10**9, DISK, v2.root).__enter__()
    assert v2.removed == []


def test_a_limit_that_cannot_be_had_is_an_error(system):
    system.member_of("0::/")
    system.folder("", cgroup__controllers="cpu", cgroup__subtree_control="")
    with pytest.raises(CgroupError, match="memory"), groups(10**9, None, system.root):
        pass


def test_no_limit_needs_no_group(system):
    system.member_of("0::/")
    with groups(None, None, system.root) as made:
        assert made.entrances == []
        assert made.memory_use() == MemoryUse(None, 0, 0)


def test_a_limit_that_the_kernel_refuses_is_an_error_and_leaves_nothing(v1, monkeypatch):
    real = cgroups._make

    def make(*arguments):
        folder, version = real(*arguments)
        (folder / "memory.limit_in_bytes").mkdir()  # cannot be written to
        return folder, version

    monkeypatch.setattr(cgroups, "_make", make)
    with pytest.raises(CgroupError, match=r"memory\.limit_in_bytes does not take"), groups(1, None, v1.root):
        pass
    assert len(v1.removed) == 1


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_stay(v1):
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    parent = v1.root / "memory" / "job" / "1"
    dead, alive, other = parent / f"pyengine-bench-{done.pid}-1", parent / "pyengine-bench-1-1", parent / "web"
    for folder in (dead, alive, other):
        folder.mkdir()
    cgroups.remove_leftovers(v1.root)
    assert not dead.exists()
    assert alive.exists() and other.exists()


# ---- the real ones

GREEDY = """
import json
block = bytearray(400 << 20)
block[::4096] = b"x" * len(block[::4096])
print(json.dumps({"status": "ok"}))
"""


@pytest.fixture
def greedy(tmp_path, monkeypatch):
    """A module that needs 400 MiB."""
    (tmp_path / "greedy_module.py").write_text(GREEDY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "greedy_module"


def real_groups(limit):
    made = groups(limit, None)
    try:
        entered = made.__enter__()
        entered.entrances[0].stat()
    except (CgroupError, IndexError, OSError) as error:
        pytest.skip(f"no memory control group can be made here: {error}")
    return made, entered


@pytest.mark.parametrize(("limit", "status"), [(100 << 20, "out of memory"), (600 << 20, "ok")])
def test_a_child_over_its_limit_is_killed_and_recorded(greedy, limit, status):
    made, entered = real_groups(limit)
    try:
        outcome = launch(greedy, {}, entered, 60)
    finally:
        made.__exit__(None, None, None)
    assert outcome.status == status, outcome
    assert json.dumps(outcome.reason)
    if outcome.memory.peak is not None:
        assert outcome.memory.peak <= limit
        assert (outcome.memory.peak > 400 << 20) == (status == "ok")
    assert not any(folder.exists() for folder in entered.folders)
