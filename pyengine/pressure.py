"""Gives expert memory back when the machine runs short of it, and takes it again when the shortage is over."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from pyengine.budget import available_memory, reserve

_log = logging.getLogger("pyengine")

_PERIOD = 1.0  # seconds between looks
_CALM = 10  # looks without shortage before the budget grows again
_STEP = 0.25  # share of the wanted budget that comes back per calm spell
_LEAST_STEP = 0.05  # no less than that: every change of a GPU's slots empties them


def half_the_reserve() -> int:
    """Bytes. "auto" leaves the whole reserve free; half of it may be gone before anything is done."""
    return reserve() // 2


class PressureWatch:
    """Watches free memory on its own sleeping thread.

    Args:
        wanted: the budget the user's choice gives, bytes; updated by set_wanted.
        least: never go below, bytes.
        apply: called with the new budget in bytes when it must change.
        available: bytes that can still be taken without swapping.
        floor: bytes of them that must stay free.
        where: memory of what, for messages.
        period: seconds between looks, if not a second.
    """

    def __init__(
        self,
        wanted: int,
        least: int,
        apply: Callable[[int], int | None],
        available: Callable[[], int] = available_memory,
        floor: Callable[[], int] = half_the_reserve,
        where: str = "",
        period: float | None = None,
    ) -> None:
        self._wanted = self._now = wanted
        self._least = least
        self._apply = apply
        self._available, self._floor = available, floor
        self._where, self._period = where, period
        self._calm = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pyengine-pressure", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def set_wanted(self, wanted: int) -> None:
        """The user changed the budget."""
        with self._lock:
            self._wanted = self._now = wanted
            self._calm = 0
            self._apply(wanted)

    def look(self) -> None:
        """One look; the thread does this every second."""
        with self._lock:
            floor = self._floor()
            spare = self._available() - floor
            if spare < 0 and self._now > self._least:
                self._change(max(self._least, self._now + spare - floor // 2), "short")
                self._calm = 0
            elif self._now < self._wanted and spare - floor >= self._step(_LEAST_STEP):
                self._calm += 1
                if self._calm >= _CALM:
                    self._change(self._now + min(self._step(_STEP), spare - floor), "free again")
                    self._calm = 0
            else:
                self._calm = 0

    def _step(self, share: float) -> int:
        """Of the wanted budget, or what is missing of it if that is less: the last steps must not be small ones."""
        return min(self._wanted - self._now, max(1, int(share * self._wanted)))

    def _change(self, budget: int, why: str) -> None:
        if budget != self._now:
            place = f"{self._where} memory" if self._where else "memory"
            _log.warning("%s is %s: expert budget %.1f -> %.1f MiB", place, why, self._now / 2**20, budget / 2**20)
            self._now = budget
            self._apply(budget)

    def _run(self) -> None:
        while not self._stop.wait(_PERIOD if self._period is None else self._period):
            self.look()
