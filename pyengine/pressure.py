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
_MOST_SAID = 20  # failures that are told of: a message with figures in it is another one each time


def half_the_reserve() -> int:
    """Bytes. "auto" leaves the whole reserve free; half of it may be gone before anything is done."""
    return reserve() // 2


class PressureWatch:
    """Watches free memory on its own sleeping thread. What fails there is said, and the next look happens.

    Args:
        wanted: the budget the user's choice gives, bytes; updated by set_wanted.
        least: never go below, bytes.
        apply: called with the new budget in bytes when it must change. Returns the budget that is in force then, bytes.
            If it raises, the one before counts as in force.
        changed: called when a look has applied a budget. If it raises, that one is in force nevertheless.
        available: bytes that can still be taken without swapping.
        floor: bytes of them that must stay free.
        where: memory of what, for messages.
        period: seconds between looks, if not a second.
    """

    def __init__(
        self,
        wanted: int,
        least: int,
        apply: Callable[[int], int],
        available: Callable[[], int] = available_memory,
        floor: Callable[[], int] = half_the_reserve,
        where: str = "",
        period: float | None = None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._wanted = self._now = wanted
        self._least = least
        self._apply, self._changed = apply, changed
        self._available, self._floor = available, floor
        self._memory = f"{where} memory" if where else "memory"
        self._period = period
        self._calm, self._patience = 0, _CALM
        self._said: set[str] = set()
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
        """The user changed the budget. Raises what `apply` raises; then the user's choice before holds."""
        with self._lock:
            self._now = self._apply(wanted)
            self._wanted = wanted
            self._calm, self._patience = 0, _CALM

    def look(self) -> None:
        """One look; the thread does this every second."""
        with self._lock:
            floor = self._floor()
            spare = self._available() - floor
            if spare < 0 and self._now > self._least:
                self._calm, self._patience = 0, _CALM
                self._change(max(self._least, self._now + spare - floor // 2), "short")
            elif self._now < self._wanted and spare - floor >= self._step(_LEAST_STEP):
                self._calm += 1
                if self._calm >= self._patience:
                    self._grow(min(self._step(_STEP), spare - floor))
            else:
                self._calm = 0

    def _step(self, share: float) -> int:
        """Of the wanted budget, or what is missing of it if that is less: the last steps must not be small ones."""
        return min(self._wanted - self._now, max(1, int(share * self._wanted)))

    def _grow(self, by: int) -> None:
        """What was refused is asked for again after a longer spell each time: trying may empty a GPU's slots."""
        asked = max(self._least, self._now + by)
        self._calm, self._patience = 0, 2 * self._patience
        self._change(asked, "free again")
        if self._now == asked:
            self._patience = _CALM

    def _change(self, budget: int, why: str) -> None:
        if budget == self._now:
            return
        before, self._now = self._now, self._apply(budget)
        if self._now != before:
            said = "%s is %s: expert budget %.1f -> %.1f MiB"
            _log.warning(said, self._memory, why, before / 2**20, self._now / 2**20)
        self._changed()

    def _run(self) -> None:
        while not self._stop.wait(_PERIOD if self._period is None else self._period):
            try:
                self.look()
            except Exception as error:  # whatever it is: without the next look, memory would never be given back
                self._say(f"{type(error).__name__}: {error}")

    def _say(self, reason: str) -> None:
        if reason not in self._said and len(self._said) < _MOST_SAID:
            self._said.add(reason)
            _log.error("the expert budget could not follow %s (trying again): %s", self._memory, reason)
