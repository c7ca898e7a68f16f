"""Making a model's bundle while the model is in use: whether that pays, and the program that does it in the background.

The making itself is gguf_tools' work, in a process of its own with the lowest priority.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pyengine.budget import resolve
from pyengine.bundles import SUFFIX, cache_folder, partial_of, place_for
from pyengine.engine import ExpertEngine
from pyengine.errors import BudgetError, UsageError

#: Most of the free disk that bundles made this way may take, those in the cache folder counted.
DEFAULT_CAP = "25%"

#: Of the disk, never taken: a twentieth, and at least this many bytes.
_LEAST_FREE_SHARE, _LEAST_FREE = 0.05, 2 << 30

#: What one thread of the lowest priority makes of a model on a common SSD, bytes per second; for a first guess.
_LIKELY_SPEED = 250e6

#: Exit code of `gguf_tools bundle` when another process makes the same bundle.
_BUSY = 3

#: Seconds that the program has at our exit to note how far it is.
_PATIENCE = 10.0


@dataclass(frozen=True)
class Offer:
    """A bundle that would pay. begun: an unfinished one is there, which somebody agreed to."""

    model: Path
    target: Path
    n_bytes: int
    begun: bool

    @property
    def seconds(self) -> float:
        """About how long the making takes."""
        return self.n_bytes / _LIKELY_SPEED

    @property
    def question(self) -> str:
        place = "beside it" if self.target.parent == self.model.parent else f"in {self.target.parent}"
        cost = f"{format_size(self.n_bytes)}, about {_duration(self.seconds)}"
        return f"Make a bundle of {self.model.name} {place} ({cost})?"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def format_size(n_bytes: int) -> str:
    """A number of bytes as disks are sold: "62 MB", "8.0 GB"."""
    return f"{n_bytes / 1e6:.0f} MB" if n_bytes < 1e9 else f"{n_bytes / 1e9:.1f} GB"


def consider(engine: ExpertEngine | None, model: Path, cap: str = DEFAULT_CAP) -> Offer | str:
    """An offer to make a bundle, or why there is none: no experts, a GPU, one in use, nothing to gain, no room.

    Args:
        engine: of the loaded model.
        model: its GGUF file.
        cap: bytes that this bundle and those in the cache folder may take together: a size, or a share of what is free
            plus what those take ("25%").

    Raises:
        UsageError: the cap is not understood.
    """
    cap_bytes(cap, 0)  # a word that is not understood is worth saying in any case
    if engine is None:
        return "the model has no experts that pyengine manages"
    if engine.gpu_devices:
        return "bundles are in the layout of the CPU, and a GPU is in use"
    stats = engine.stats()
    if stats["bundle"] is not None:
        return "one is in use"
    n_bytes = engine.info.slot_bytes
    if stats["budget_bytes"] >= n_bytes:
        return "all experts fit into memory"
    target = place_for(model)
    partial = partial_of(target)
    there = _on_disk(partial)
    free = shutil.disk_usage(partial.parent)
    keep = max(_LEAST_FREE, int(_LEAST_FREE_SHARE * free.total))
    missing = n_bytes - there
    if free.free - missing < keep:
        return f"it takes {format_size(n_bytes)}, and {format_size(keep)} of the disk are to stay free"
    others = sum(_on_disk(path) for path in _cached() if path not in (target, partial))
    most = cap_bytes(cap, free.free + there + others)
    if others + n_bytes > most:
        beside = f" beside {format_size(others)} of other bundles" if others else ""
        allowed = format_size(max(0, most - others))
        return f"it takes {format_size(n_bytes)}, and --bundle-cap {cap} allows {allowed}{beside}"
    return Offer(model, target, n_bytes, begun=there > 0)


def cap_bytes(cap: str, room: int) -> int:
    """The cap in bytes, a share being one of `room`. Raises UsageError if it is not understood."""
    with contextlib.suppress(BudgetError):
        if cap.strip().lower() != "auto":
            return resolve(cap, slot_bytes=room, least=0)
    raise UsageError(f'bundle cap {cap!r:.40} is not understood; write "25%", "20GiB" or bytes')


def _on_disk(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0


def _cached() -> list[Path]:
    folder = cache_folder()
    return [path for path in folder.iterdir() if SUFFIX in path.name] if folder.is_dir() else []


class BackgroundBundle:
    """`gguf_tools bundle` at work in the background. What it does not finish, the next one goes on with.

    Args:
        offer: what to make.
        say: gets one line when it has ended by itself; called on a thread of its own.
    """

    def __init__(self, offer: Offer, say: Callable[[str], None]) -> None:
        command = [sys.executable, "-m", "gguf_tools", "bundle", str(offer.model.absolute()), "-o", str(offer.target)]
        self._offer = offer
        self._say = say
        self._stopping = False
        self._process = subprocess.Popen(
            [*command, "--quiet", "--low-priority"],
            env=os.environ | {"PYTHONSAFEPATH": "1"},  # not a gguf_tools of the folder we happen to be in
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # the terminal's Ctrl-C is for the conversation
        )
        self._watcher = threading.Thread(target=self._watch, name="background bundle", daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        _, complaint = self._process.communicate()
        if self._stopping:
            return
        code, name = self._process.returncode, self._offer.target.name
        if code == 0:
            self._say(f"the bundle {name} is ready; it is used from the next start on")
        elif code == _BUSY:
            self._say(f"another process is making the bundle {name}")
        else:
            last = complaint.strip().splitlines()[-1:] or [f"exit code {code}"]
            self._say(f"the bundle {name} was not made: {last[0].removeprefix('gguf_tools: error: ')}")

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> bool:
        """End it if it still runs, and let it note how far it is. Whether it was still running."""
        self._stopping = True
        running = self.running
        if running:
            self._process.terminate()
            try:
                self._process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._watcher.join(_PATIENCE)
        return running
