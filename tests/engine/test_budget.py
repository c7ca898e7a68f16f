"""What a budget means in bytes, and what the system can spare: machines and control groups of every kind, faked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from pyengine import budget
from pyengine.budget import available_memory, check_wording, memory_limit, reserve, resolve
from pyengine.errors import BudgetError

MIB, GIB = 1 << 20, 1 << 30
UNLIMITED_V1 = 0x7FFFFFFFFFFFF000  # how version 1 of control groups says "no limit"

# ---- the wording


@pytest.mark.parametrize(
    ("wording", "wanted"),
    [
        ("50%", 5 * GIB),
        ("12.5%", 10 * GIB // 8),
        ("100%", 10 * GIB),
        ("250 %", 10 * GIB),
        ("2GiB", 2 * GIB),
        ("2gb", 2 * GIB),
        (" 2 G ", 2 * GIB),
        ("1.5g", 3 * GIB // 2),
        ("700M", 700 * MIB),
        ("300000K", 300000 << 10),
        ("1T", 10 * GIB),
        ("123456789", 123456789),
        ("123456789B", 123456789),
        (123456789, 123456789),
        (1 << 80, 10 * GIB),
        ("9" * 400, 10 * GIB),
        ("9" * 400 + "%", 10 * GIB),
    ],
)
def test_a_budget_in_bytes(wording: str | int, wanted: int) -> None:
    assert resolve(wording, slot_bytes=10 * GIB, least=MIB) == wanted


NONSENSE = "% GiB much -1 -5% 1e9 0x10 nan nan% inf% 2GiBB 5%% 1,5G ٥".split()


@pytest.mark.parametrize("wording", [*NONSENSE, "", "2 Gi Bytes"])
def test_a_budget_that_is_not_understood(wording: str) -> None:
    for look in (check_wording, lambda w: resolve(w, slot_bytes=10 * GIB, least=MIB)):
        with pytest.raises(BudgetError, match=r"is not understood; write \"auto\""):
            look(wording)


@pytest.mark.parametrize("wording", [True, 0.5, None, b"50%"])
def test_a_budget_of_another_type(wording: object) -> None:
    with pytest.raises(BudgetError, match=f"a text or an int, not {type(wording).__name__}"):
        resolve(wording, slot_bytes=10 * GIB, least=MIB)  # type: ignore[arg-type]


@pytest.mark.parametrize("wording", ["0", 0, "0%", "1M", "0.01%", 2 * MIB - 1])
def test_a_budget_below_the_least_says_the_least(wording: str | int) -> None:
    with pytest.raises(BudgetError, match=r"at least 2,097,152"):
        resolve(wording, slot_bytes=10 * GIB, least=2 * MIB)


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(BudgetError, match="negative"):
        resolve(-1, slot_bytes=10 * GIB, least=MIB)


def test_the_least_budget_is_enough() -> None:
    assert resolve(2 * MIB, slot_bytes=10 * GIB, least=2 * MIB) == 2 * MIB


@pytest.mark.parametrize(
    ("available", "wanted"),
    [(100 * GIB, 10 * GIB), (5 * GIB, 4 * GIB), (GIB + 3 * MIB, 3 * MIB), (GIB, 2 * MIB), (0, 2 * MIB)],
)
def test_auto_leaves_the_reserve_free(available: int, wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "reserve", lambda: GIB)
    monkeypatch.setattr(budget, "_group_limits", lambda: False)
    assert resolve("Auto", slot_bytes=10 * GIB, least=2 * MIB, available=available) == wanted


@pytest.mark.parametrize(
    ("available", "wanted"),
    [
        (90 * MIB, 60 * MIB),  # everything, beside the reserve of 30 MiB
        (80 * MIB, 37 * MIB + MIB // 2),  # of 50 a quarter is left for choosing what to keep
        (20 * MIB, MIB),
        (0, MIB),
    ],
)
def test_auto_in_a_control_group(available: int, wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "reserve", lambda: 30 * MIB)
    monkeypatch.setattr(budget, "_group_limits", lambda: True)
    assert resolve("auto", slot_bytes=60 * MIB, least=MIB, available=available) == wanted
    assert resolve("auto", slot_bytes=60 * GIB, least=MIB, available=1054 * MIB) == 960 * MIB


def test_auto_asks_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "reserve", lambda: GIB)
    monkeypatch.setattr(budget, "_group_limits", lambda: False)
    monkeypatch.setattr(budget, "available_memory", lambda: 3 * GIB)
    assert resolve("auto", slot_bytes=10 * GIB, least=MIB) == 2 * GIB


# ---- the system


class Machine:
    """A root folder with the files that the kernel would have."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def write(self, path: str, text: str) -> None:
        file = self._root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def group_v2(self, group: str, limit: str, used: int, inactive: int = 0, active: int = 0) -> None:
        folder = f"/sys/fs/cgroup{group}"
        self.write(f"{folder}/memory.max", f"{limit}\n")
        self.write(f"{folder}/memory.current", f"{used}\n")
        self.write(f"{folder}/memory.stat", f"anon 5\nfile 7\ninactive_file {inactive}\nactive_file {active}\n")

    def group_v1(self, group: str, limit: int, used: int, cached: int = 0) -> None:
        folder = f"/sys/fs/cgroup/memory{group}"
        self.write(f"{folder}/memory.limit_in_bytes", f"{limit}\n")
        self.write(f"{folder}/memory.usage_in_bytes", f"{used}\n")
        stat = f"inactive_file 1\nactive_file 1\ntotal_inactive_file {cached}\ntotal_active_file 0\n"
        self.write(f"{folder}/memory.stat", stat)

    def we_are_in(self, *lines: str) -> None:
        self.write("/proc/self/cgroup", "".join(line + "\n" for line in lines))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """32 GiB of RAM, 20 of them available, and no control groups."""
    monkeypatch.setattr(budget, "Path", lambda path: tmp_path / str(path).lstrip("/"))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=32 * GIB, available=20 * GIB))
    return Machine(tmp_path)


def test_a_machine_without_control_groups(machine: Machine) -> None:
    assert (memory_limit(), available_memory()) == (32 * GIB, 20 * GIB)


def test_control_groups_without_a_limit(machine: Machine) -> None:
    machine.we_are_in("0::/user.slice/shell")
    machine.group_v2("/user.slice", "max", 5 * GIB)
    machine.group_v2("/user.slice/shell", "max", 5 * GIB)
    assert (memory_limit(), available_memory()) == (32 * GIB, 20 * GIB)


def test_a_limit_of_our_own_group(machine: Machine) -> None:
    machine.we_are_in("0::/app")
    machine.group_v2("/app", str(8 * GIB), 3 * GIB)
    assert (memory_limit(), available_memory()) == (8 * GIB, 5 * GIB)


def test_page_cache_that_can_be_dropped_is_not_used_memory(machine: Machine) -> None:
    machine.we_are_in("0::/app")
    machine.group_v2("/app", str(8 * GIB), 7 * GIB, inactive=2 * GIB, active=GIB)
    assert available_memory() == 4 * GIB


def test_a_limit_of_an_ancestor(machine: Machine) -> None:
    machine.we_are_in("0::/pod/container/app")
    machine.group_v2("/pod", str(6 * GIB), 4 * GIB)
    machine.group_v2("/pod/container", str(7 * GIB), GIB)
    machine.group_v2("/pod/container/app", "max", GIB)
    assert (memory_limit(), available_memory()) == (6 * GIB, 2 * GIB)


def test_inside_a_container_the_mount_is_our_own_group(machine: Machine) -> None:
    """The path in /proc/self/cgroup is the host's; under /sys/fs/cgroup there is only our group."""
    machine.we_are_in("0::/system.slice/docker-0123.scope")
    machine.group_v2("", str(4 * GIB), GIB)
    assert (memory_limit(), available_memory()) == (4 * GIB, 3 * GIB)


def test_a_namespaced_path_that_leads_upwards(machine: Machine) -> None:
    machine.we_are_in("0::/../sibling")
    machine.group_v2("", str(4 * GIB), GIB)
    assert memory_limit() == 4 * GIB


def test_control_groups_of_version_1(machine: Machine) -> None:
    machine.we_are_in("12:cpu,cpuacct:/docker/1", "7:memory:/docker/1", "1:name=systemd:/docker/1")
    machine.group_v1("/docker/1", 6 * GIB, 5 * GIB, cached=2 * GIB)
    machine.group_v1("/docker", UNLIMITED_V1, 9 * GIB)
    machine.group_v1("", UNLIMITED_V1, 9 * GIB)
    assert (memory_limit(), available_memory()) == (6 * GIB, 3 * GIB)


def test_control_groups_of_both_versions(machine: Machine) -> None:
    machine.we_are_in("4:cpu,memory:/one", "0::/two")
    machine.group_v1("/one", 9 * GIB, GIB)
    machine.group_v2("/two", str(8 * GIB), 6 * GIB)
    assert (memory_limit(), available_memory()) == (8 * GIB, 2 * GIB)


def test_a_group_above_its_limit_leaves_nothing(machine: Machine) -> None:
    machine.we_are_in("0::/app")
    machine.group_v2("/app", str(GIB), 2 * GIB)
    assert available_memory() == 0


@pytest.mark.parametrize("damage", ["memory.max", "memory.current", "memory.stat"])
def test_a_group_that_cannot_be_read_is_left_out(damage: str, machine: Machine) -> None:
    machine.we_are_in("0::/app")
    machine.group_v2("/app", str(GIB), GIB // 2)
    machine.write(f"/sys/fs/cgroup/app/{damage}", "what is this?\n")
    assert (memory_limit(), available_memory()) == (32 * GIB, 20 * GIB)


@pytest.mark.parametrize(("total", "wanted"), [(GIB, 256 * MIB), (16 * GIB, 16 * GIB // 10), (256 * GIB, 4 * GIB)])
def test_the_reserve(total: int, wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=total, available=total))
    monkeypatch.setattr(budget, "_control_groups", lambda: iter([(UNLIMITED_V1, 0)]))
    assert reserve() == wanted


@pytest.mark.parametrize(("limit", "wanted"), [(200 * MIB, 24 * MIB), (8 * GIB, 8 * GIB // 20), (256 * GIB, 4 * GIB)])
def test_the_reserve_in_a_control_group_is_smaller(limit: int, wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=512 * GIB, available=512 * GIB))
    monkeypatch.setattr(budget, "_control_groups", lambda: iter([(limit, 0), (UNLIMITED_V1, 0)]))
    assert reserve() == wanted


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing faked: whatever groups hold this process, the answer is within what the machine has."""
    looks: list[Callable[[], int]] = [available_memory, memory_limit]
    available, limit = (look() for look in looks)
    assert 0 < available <= limit <= psutil.virtual_memory().total
