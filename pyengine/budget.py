"""How many bytes of experts to keep in RAM or VRAM: what the user asked for, and what this machine can spare."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from pyengine.errors import BudgetError

Budget = str | int

_UNITS = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)i?b?")
_SHARE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*%")

#: Left to everything else when the budget is "auto": share of the memory, at least and at most so many bytes. A machine
#: is everybody's; a control group's limit is mostly ours, and what is left there is for this process to grow.
_OF_MACHINE = (0.10, 256 << 20, 4 << 30)
_OF_GROUP = (0.05, 24 << 20, 4 << 30)

#: In a control group also the choosing of a policy takes memory of ours (a process beside this one), bytes; at most
#: this share of what could be slots. With every expert in a slot there is nothing to choose.
_CHOOSING, _MOST_FOR_CHOOSING = 64 << 20, 0.25


def resolve(
    budget: Budget,
    *,
    slot_bytes: int,
    least: int,
    available: int | None = None,
    left: int | None = None,
    name: str = "ram_budget",
) -> int:
    """Bytes of slots for a budget as a user writes it.

    Args:
        budget: "auto", a share of all experts ("50%"), a size ("2GiB", "700M"; units are powers of 1024) or bytes.
        slot_bytes: bytes that keep every expert resident.
        least: the smallest budget that works, bytes.
        available: bytes that could be taken; only "auto" looks at it. None asks the system for those of RAM.
        left: of them "auto" leaves so many. None: what RAM's reserve() is, and in a control group what choosing takes.
        name: of the budget, for messages.

    Raises:
        BudgetError: not understood, or below `least`.
    """
    wanted = _wanted(budget, slot_bytes, name)
    if wanted is None:
        if available is None:
            available = available_memory()
        most = _most_slots(slot_bytes, available - reserve()) if left is None else min(slot_bytes, available - left)
        return max(least, most)
    if wanted < least:
        raise BudgetError(f"{name} {budget!r} is {wanted:,} bytes; this model needs at least {least:,}")
    return min(wanted, slot_bytes)


def _most_slots(slot_bytes: int, spare: int) -> int:
    if spare >= slot_bytes or not _group_limits():
        return min(slot_bytes, spare)
    return spare - min(_CHOOSING, int(_MOST_FOR_CHOOSING * max(0, spare)))


def check_wording(budget: Budget, name: str = "ram_budget") -> None:
    """Raise BudgetError for a budget that no model could take."""
    _wanted(budget, 0, name)


def _wanted(budget: Budget, slot_bytes: int, name: str) -> int | None:
    """The bytes a budget asks for; None for "auto". Raises BudgetError if it is not understood."""
    if isinstance(budget, bool) or not isinstance(budget, (str, int)):
        raise BudgetError(f"{name} must be a text or an int, not {type(budget).__name__}")
    if isinstance(budget, int):
        if budget < 0:
            raise BudgetError(f"{name} must not be negative")
        return budget
    text = budget.strip().lower()
    if text == "auto":
        return None
    size, share = _SIZE.fullmatch(text), _SHARE.fullmatch(text)
    if share is not None:
        value = float(share[1]) / 100 * slot_bytes
    elif size is not None:
        value = float(size[1]) * _UNITS[size[2]]
    else:
        raise BudgetError(f'{name} {budget!r:.40} is not understood; write "auto", "50%", "2GiB" or bytes')
    return int(min(value, float(sys.maxsize)))  # a long row of digits is infinity to float


def reserve() -> int:
    """Bytes to leave free: for the system and other programs, or in a control group that is smaller than the machine,
    for what this process itself will need beside its slots."""
    share, least, most = _OF_GROUP if _group_limits() else _OF_MACHINE
    return max(least, min(most, int(share * memory_limit())))


def _group_limits() -> bool:
    """Whether it is a control group that limits this process, and not the machine's memory."""
    return memory_limit() < int(psutil.virtual_memory().total)


def memory_limit() -> int:
    """Bytes of RAM this process may use: the machine's, or its control group's limit if that is lower."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _control_groups())])


def available_memory() -> int:
    """Bytes this process can still take without swapping, control-group limits included."""
    return max(0, min([psutil.virtual_memory().available, *(limit - used for limit, used in _control_groups())]))


def _control_groups() -> Iterator[tuple[int, int]]:
    """(limit, use) in bytes of every memory control group that holds this process. Page cache that can be dropped at
    once does not count as use."""
    for folder, version in _memory_folders():
        try:
            if version == 2:
                limit, use = _read(folder / "memory.max"), _read(folder / "memory.current")
                names = ("inactive_file", "active_file")
            else:
                limit, use = _read(folder / "memory.limit_in_bytes"), _read(folder / "memory.usage_in_bytes")
                names = ("total_inactive_file", "total_active_file")
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue  # "max", or a file that this kernel does not have: no limit here
        yield limit, max(0, use - sum(int(stat.get(name, 0)) for name in names))


def _read(path: Path) -> int:
    return int(path.read_text())


def _memory_folders() -> Iterator[tuple[Path, int]]:
    """Folders of our memory control groups and their ancestors, with the version of their interface."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            root, version = Path("/sys/fs/cgroup"), 2
        elif "memory" in controllers.split(","):
            root, version = Path("/sys/fs/cgroup/memory"), 1
        else:
            continue
        folder = root / group.lstrip("/")
        if not folder.is_dir():
            folder = root  # inside a container the path is the host's, the mount our own
        while True:
            yield folder, version
            if folder == root or root not in folder.parents:
                break
            folder = folder.parent
