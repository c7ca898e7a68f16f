"""Control groups for one sample: a limit on memory and one on disk reads, with the peak and the kills they saw.

Both interfaces of Linux are spoken: v1 (a tree for each controller) and v2 (one tree). The groups are made below the
group of this process (v1) or of its nearest ancestor that hands the controller on (v2), so limits from above stay in
force. Where a group cannot be made, the caller is told why; nothing runs unlimited in silence.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pyengine.errors import PyengineError

#: What our groups are called, followed by the process id of the benchmark.
PREFIX = "pyengine-bench-"

_SYSTEM = Path("/sys/fs/cgroup")
_HANDED_ON = "cgroup.subtree_control"
_MEMBERSHIP = Path("/proc/self/cgroup")
_REMOVAL_S = 5.0
_FAIL_COUNTS = ("memory.failcnt", "memory.memsw.failcnt")


class CgroupError(PyengineError):
    """A control group cannot be made or does not take its limit."""


@dataclass(frozen=True)
class MemoryUse:
    """What a memory control group saw. peak: most bytes at once, page cache included, None if this kernel does not
    tell;
    kills: processes killed for want of memory; at_limit: times its limit was reached (each a search for pages to
        drop)."""

    peak: int | None
    kills: int
    at_limit: int


@dataclass
class Groups:
    """The control groups of one sample."""

    folders: list[Path] = field(default_factory=list)
    _memory: Path | None = None
    _io: Path | None = None
    _version: int = 1

    @property
    def entrances(self) -> list[Path]:
        """Files into which a process writes its id to be limited, all of them."""
        return [folder / "cgroup.procs" for folder in self.folders]

    def limit_disk(self, limit: DiskLimit) -> None:
        """Change the limit of groups that were made with one, for reads from now on.

        Raises:
            CgroupError: they were not, or the kernel does not take it.
        """
        if self._io is None:
            raise CgroupError("these control groups were made without a limit on the disk")
        _limit_disk(self._io, self._version, limit)

    def memory_use(self) -> MemoryUse:
        """Raises OSError or ValueError if the kernel's files are not as they should be."""
        folder = self._memory
        if folder is None:
            return MemoryUse(None, 0, 0)
        if self._version == 1:
            kills = _fields(folder / "memory.oom_control").get("oom_kill", 0)
            return MemoryUse(
                _number(folder / "memory.max_usage_in_bytes"),
                kills,
                # The limit on memory and swap together is as low and is asked first.
                sum(_number(folder / name) for name in _FAIL_COUNTS if (folder / name).exists()),
            )
        events = _fields(folder / "memory.events")
        peak = _number(folder / "memory.peak") if (folder / "memory.peak").exists() else None
        return MemoryUse(peak, events.get("oom_kill", 0), events.get("max", 0))


@contextlib.contextmanager
def groups(memory_limit: int | None, disk_limit: DiskLimit | None, system: Path = _SYSTEM) -> Iterator[Groups]:
    """Fresh control groups; removed at the end, when no process may be left in them.

    Args:
        memory_limit: bytes, page cache included; None: no limit, but the peak is still observed.
        disk_limit: reads allowed per second, or None.

    Raises:
        CgroupError: a group cannot be made. (With no memory limit asked for, a missing memory group is no error.)
    """
    made = Groups()
    try:
        try:
            also = ("io",) if disk_limit is not None else ()
            made._memory, made._version = _make("memory", system, made.folders, also)
            if memory_limit is not None:
                _limit_memory(made._memory, made._version, memory_limit)
        except CgroupError:
            if memory_limit is not None:
                raise
        if disk_limit is not None:
            made._io, made._version = _make("io", system, made.folders)
            made.limit_disk(disk_limit)
        yield made
    finally:
        for folder in reversed(made.folders):
            _remove(folder)


@dataclass(frozen=True)
class DiskLimit:
    """At most `bytes_per_s` read from the block device `device` ("major:minor"); None: no limit yet."""

    device: str
    bytes_per_s: int | None


def block_device(path: Path) -> str:
    """ "major:minor" of the whole disk that holds a file; throttling a partition is not allowed.

    Raises:
        CgroupError: the file is on no block device (a network or memory file system).
    """
    number = path.stat().st_dev
    name = f"{os.major(number)}:{os.minor(number)}"
    entry = Path("/sys/dev/block") / name
    if not entry.exists():
        raise CgroupError(f"{path} is not on a block device, so its reads cannot be limited")
    entry = entry.resolve()
    if (entry / "partition").exists():
        name = (entry.parent / "dev").read_text().strip()
    return name


def remove_leftovers(system: Path = _SYSTEM) -> None:
    """Remove the empty groups of benchmarks that were killed."""
    for controller in ("memory", "io"):
        with contextlib.suppress(CgroupError):
            for parent in _parents(controller, system)[0]:
                for folder in parent.glob(f"{PREFIX}*"):
                    pid = folder.name.removeprefix(PREFIX).partition("-")[0]
                    if pid.isdigit() and not Path("/proc", pid).exists():
                        with contextlib.suppress(OSError):
                            folder.rmdir()


_serial = 0


def _make(controller: str, system: Path, made: list[Path], also: Sequence[str] = ()) -> tuple[Path, int]:
    """A new group for a controller, and the version of its interface. One of v2 serves all controllers: the first one
    made must be for those in `also`, too."""
    global _serial
    parents, version = _parents(controller, system)
    if version == 2 and made:
        return made[0], 2
    if version == 2:
        parents = [parent for parent in parents if set(also) <= set(_words(parent / _HANDED_ON))]
    _serial += 1
    failure: OSError | None = None
    for parent in parents:
        folder = parent / f"{PREFIX}{os.getpid()}-{_serial}"
        try:
            folder.mkdir()
        except OSError as error:
            failure = error
            continue
        made.append(folder)
        return folder, version
    names = " and ".join((controller, *also)) if version == 2 else controller
    why = failure.strerror if failure else f"no group above this process hands on {names}"
    raise CgroupError(f"no control group for {names} can be made: {why}")


def _parents(controller: str, system: Path) -> tuple[list[Path], int]:
    """Groups below which one with this controller may be made, the nearest first, and the version of their
    interface."""
    v1_name = "blkio" if controller == "io" else controller
    own: dict[str, str] = {}
    try:
        for line in _MEMBERSHIP.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            own |= dict.fromkeys(controllers.split(","), group)
    except OSError as error:
        raise CgroupError(f"this system tells nothing of control groups: {error.strerror}") from error
    if v1_name in own and (system / v1_name).is_dir():
        return [_own_folder(system / v1_name, own[v1_name])], 1
    root = system / "unified" if (system / "unified").is_dir() else system
    if "" not in own or not (root / "cgroup.controllers").exists():
        raise CgroupError(f"this system has no control groups for {controller}")
    folder = _own_folder(root, own[""])
    chain = [folder, *(parent for parent in folder.parents if parent == root or root in parent.parents)]
    return [one for one in chain if controller in _words(one / _HANDED_ON)], 2


def _own_folder(root: Path, group: str) -> Path:
    folder = root / group.lstrip("/")
    return folder if folder.is_dir() else root  # inside a container the path is the host's, the mount our own


def _limit_memory(folder: Path, version: int, limit: int) -> None:
    if version == 1:
        _write(folder / "memory.limit_in_bytes", str(limit))
        if (folder / "memory.memsw.limit_in_bytes").exists():
            _write(folder / "memory.memsw.limit_in_bytes", str(limit))  # memory and swap together
    else:
        _write(folder / "memory.max", str(limit))
        if (folder / "memory.swap.max").exists():
            _write(folder / "memory.swap.max", "0")


def _limit_disk(folder: Path, version: int, limit: DiskLimit) -> None:
    if version == 1:
        _write(folder / "blkio.throttle.read_bps_device", f"{limit.device} {limit.bytes_per_s or 0}")  # 0 lifts it
    else:
        _write(folder / "io.max", f"{limit.device} rbps={limit.bytes_per_s or 'max'}")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise CgroupError(f"{path.name} does not take {text!r}: {error.strerror}") from error


def _remove(folder: Path) -> None:
    """Remove a group; the kernel needs a moment after its last process has ended."""
    end = time.monotonic() + _REMOVAL_S
    while True:
        try:
            folder.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > end:
                return  # remove_leftovers() of a later run finds it
            time.sleep(0.05)


def _number(path: Path) -> int:
    return int(path.read_text())


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _fields(path: Path) -> dict[str, int]:
    return {name: int(value) for name, value in (line.split() for line in path.read_text().splitlines())}
