"""What is missing in VRAM, and of that in the RAM behind it: the engine's two levels of slots in a few lines. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence


class RamBehind:
    """Slots in RAM. What is read from disk takes one while some are empty; what leaves VRAM is copied back, in the
    place of a copy of what is in VRAM if there is one, else of the oldest (native/src/ram_tier.h)."""

    def __init__(self, slots: int, resident: Iterable[int]) -> None:
        self._slots = slots
        self._needed: OrderedDict[int, None] = OrderedDict.fromkeys(resident)
        self._above: OrderedDict[int, None] = OrderedDict()  # also in VRAM

    def take(self, expert: int) -> bool:
        """The expert goes to VRAM; whether it was here."""
        if expert in self._needed:
            del self._needed[expert]
            self._above[expert] = None
            return True
        if expert in self._above:
            self._above.move_to_end(expert)
            return True
        if len(self._needed) + len(self._above) < self._slots:
            self._above[expert] = None
        return False

    def left_vram(self, expert: int) -> None:
        if self._slots:
            if expert in self._above:
                del self._above[expert]
            elif len(self._needed) + len(self._above) >= self._slots:
                (self._above or self._needed).popitem(last=False)
            self._needed[expert] = None


def replay_tiers(
    steps: Iterable[Sequence[int]], slots: int, ram_slots: int, resident: Sequence[int], behind: Iterable[int]
) -> Iterator[tuple[int, int]]:
    """For each step, how many of its experts are missing in VRAM, and how many of those in RAM too.

    Args:
        steps: the experts each step needs, as numbers that are unique within a shape class.
        slots, ram_slots: of the class; at least 1, and perhaps 0.
        resident: experts that lie in VRAM at the beginning, longest unused first; at most `slots`.
        behind: those that lie in RAM then; at most `ram_slots`.
    """
    used: OrderedDict[int, None] = OrderedDict.fromkeys(resident)
    ram = RamBehind(ram_slots, behind)
    for wanted in steps:
        missing = []
        for expert in wanted:
            if expert in used:
                used.move_to_end(expert)
            else:
                missing.append(expert)
        read = 0
        for expert in missing:
            read += not ram.take(expert)
            if len(used) >= slots:
                ram.left_vram(used.popitem(last=False)[0])
            used[expert] = None
        yield len(missing), read
