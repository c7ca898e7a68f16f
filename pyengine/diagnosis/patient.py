"""The machine and the model that are examined, behind one object whose parts tests replace."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from pyengine.budget import available_memory, memory_limit
from pyengine.cache import cache_dir

if TYPE_CHECKING:
    from pyengine.native import Device
    from pyengine.planning.link import LinkSpeed
    from pyengine.planning.shape import ModelShape


def _address_limit() -> int | None:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def _allowed_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _devices() -> list[Device]:
    """What llama.cpp can compute on; nothing where the native part cannot be used (its own check says why)."""
    from pyengine import startup
    from pyengine.errors import StartupError

    try:
        startup.check()
        from pyengine.native import devices

        return devices()
    except (StartupError, RuntimeError, ImportError, OSError):
        return []


def _link(device: Device) -> LinkSpeed | None:
    from pyengine.planning.link import known_link

    return known_link(device)


def _built_for_gpu() -> bool:
    try:
        import llama_cpp

        return bool(llama_cpp.llama_supports_gpu_offload())
    except (ImportError, OSError, RuntimeError):
        return False


@dataclass(frozen=True)
class Patient:
    """Where checks read from.

    model is the file to examine; shape what its metadata says, None if it is not managed or cannot be read (the model's
    own check says why).
    """

    model: Path
    shape: ModelShape | None = None
    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    dev: Path = Path("/dev")
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    cache: Path = field(default_factory=cache_dir)
    memory_limit: Callable[[], int] = memory_limit
    memory_total: Callable[[], int] = lambda: psutil.virtual_memory().total
    memory_available: Callable[[], int] = available_memory
    address_limit: Callable[[], int | None] = _address_limit
    allowed_cores: Callable[[], int] = _allowed_cores
    devices: Callable[[], list[Device]] = _devices
    link: Callable[[Device], LinkSpeed | None] = _link
    built_for_gpu: Callable[[], bool] = _built_for_gpu

    def read(self, path: Path) -> str | None:
        """The text of a small file of the kernel, without the newline at its end; None if there is none."""
        try:
            return path.read_text(encoding="utf-8", errors="replace").rstrip("\n")
        except OSError:
            return None

    def meminfo(self, name: str) -> int | None:
        """A size of /proc/meminfo, bytes."""
        for line in (self.read(self.proc / "meminfo") or "").splitlines():
            label, _, value = line.partition(":")
            if label == name:
                words = value.split()
                return int(words[0]) * 1024 if words and words[0].isdigit() else None
        return None

    def control_groups(self) -> Iterator[Path]:
        """Folders of this process's control groups and their ancestors, those of the cpu controller first asked."""
        for line in (self.read(self.proc / "self/cgroup") or "").splitlines():
            parts = line.split(":", 2)
            if len(parts) != 3 or (parts[1] and "cpu" not in parts[1].split(",")):
                continue
            root = self.sys / "fs/cgroup" / ("cpu" if parts[1] else "")
            folder = root / parts[2].lstrip("/")
            if not folder.is_dir():
                folder = root  # inside a container the path is the host's, the mount our own
            while True:
                yield folder
                if folder == root or root not in folder.parents:
                    break
                folder = folder.parent

    def mount(self, path: Path) -> tuple[str, str] | None:
        """(file system type, device number "major:minor") of what the path lies on, after /proc/self/mountinfo."""
        wanted = os.path.realpath(path)
        best: tuple[int, str, str] | None = None
        for line in (self.read(self.proc / "self/mountinfo") or "").splitlines():
            before, _, after = line.partition(" - ")
            fields, kind = before.split(), after.split()
            if len(fields) < 5 or not kind:
                continue
            point = fields[4].replace("\\040", " ")
            inside = wanted == point or wanted.startswith(point.rstrip("/") + "/")
            if inside and (best is None or len(point) >= best[0]):  # the last one mounted on a point hides the others
                best = len(point), kind[0], fields[2]
        return best[1:] if best is not None else None
