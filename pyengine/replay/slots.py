"""Which experts lie in slots while a trace is replayed: the rules of the native engine (slot_store.cpp,
layer_step.cpp).

A layer's experts come as a set. Hits first, touched in ascending order; no member is a victim before it has computed;
the missing load those that most tokens chose first; empty slots before victims; the victim is the lowest priority, ties
by oldest use. With fewer slots than the set, passes free slots: here loads land in the order in which they began, each
alone.

Every resident has one 64-bit key, its priority above its last use, so that the victim is the smallest key.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pyengine.replay.layout import Layout

#: Key of what cannot be a victim: an expert that is absent, or pinned.
NEVER = (1 << 64) - 1
_USE_BITS = 32
_USE = np.uint64((1 << _USE_BITS) - 1)
_SIGN = np.uint32(1 << 31)
#: The priority bits of +inf.
_INFINITE = 0xFF800000 << _USE_BITS


class ReplayedSlots:
    """The directory. Experts are numbers: place[layer] + id."""

    def __init__(self, layout: Layout) -> None:
        n_expert = layout.n_expert
        order = [layer for group in layout.groups for layer in group]
        n = len(order) * n_expert
        self.n_expert = n_expert
        self.n_layer = layout.n_layer
        self.place = [order.index(layer) * n_expert for layer in range(layout.n_layer)]
        self.group_of = [
            next(g for g, layers in enumerate(layout.groups) if layer in layers) for layer in range(len(order))
        ]
        self.slots = list(layout.slots)
        self.free = list(layout.slots)
        self.here = bytearray(n)
        self.evicted: list[int] | None = None
        """If it is a list: the experts that leave, in order"""
        self._order = np.array(order)
        self._keys = np.full(n, NEVER, np.uint64)
        self._above = np.full(n, 1 << 63, np.uint64)  # priority 0
        # Single elements are read and written much faster through a memoryview than in an array.
        self._key, self.above = self._keys.data, self._above.data
        ends = np.cumsum([len(layers) * n_expert for layers in layout.groups]).tolist()
        self._first = [end - len(layers) * n_expert for end, layers in zip(ends, layout.groups, strict=True)]
        self._smallest = [self._keys[a:b].argmin for a, b in zip(self._first, ends, strict=True)]
        self._clock = 0

    def set_priorities(self, priorities: npt.NDArray[np.float32]) -> None:
        """float32 [n_layer, n_expert]; NaN counts as zero."""
        values = priorities.astype(np.float32)[self._order].ravel() + np.float32(0)  # -0 becomes 0
        values[np.isnan(values)] = 0
        bits = values.view(np.uint32)
        ordered = np.where(bits & _SIGN, ~bits, bits | _SIGN)
        np.left_shift(ordered, _USE_BITS, out=self._above, dtype=np.uint64)
        movable = self._keys != NEVER
        self._keys[movable] = (self._keys[movable] & _USE) | self._above[movable]

    def n_above(self, layer: int, expert: int) -> int:
        """How many experts of its layer have a higher priority than this one."""
        first = self.place[layer]
        return int(np.count_nonzero(self._above[first : first + self.n_expert] > self._above[expert]))

    def set_next_uses(self, experts: npt.NDArray[np.int64], priorities: npt.NDArray[np.int64]) -> None:
        """Integer priorities, 0 to 2**32 - 1, for some experts, who are used before the next victim is chosen."""
        self._above[experts] = priorities.astype(np.uint64) << np.uint64(_USE_BITS)

    def use(self, layer: int, wanted: Sequence[int]) -> int:
        """A step of one layer that needs the experts `wanted`, ascending, the missing loaded in this order too. Returns
        how many are missing."""
        here = self.here
        missing = [e for e in wanted if not here[e]]
        if missing:
            self._load([e for e in wanted if here[e]], missing, self.group_of[layer])
        else:
            self._touch(wanted)
        return len(missing)

    def use_by_many(self, layer: int, wanted: Sequence[int], pairs: Sequence[int]) -> int:
        """The same for a micro-batch of several tokens, of which pairs[i] chose wanted[i]."""
        here = self.here
        missing = sorted((-n, e) for e, n in zip(wanted, pairs, strict=True) if not here[e])
        if missing:
            self._load([e for e in wanted if here[e]], [e for _, e in missing], self.group_of[layer])
        else:
            self._touch(wanted)
        return len(missing)

    def victim(self, group: int) -> int | None:
        """Who would leave; None if there is an empty slot, or nobody may leave."""
        if self.free[group]:
            return None
        victim = self._first[group] + int(self._smallest[group]())
        return None if self._key[victim] == NEVER else victim

    def only_pins(self, group: int) -> bool:
        """Whether a prefetch must find no slot: there is no empty one, and who would leave has an infinite priority."""
        victim = self.victim(group)
        return not self.free[group] and (victim is None or self.above[victim] >= _INFINITE)

    def layer_of(self, expert: int) -> int:
        """The layer of an expert's number."""
        return int(self._order[expert // self.n_expert])

    def last_use(self, expert: int) -> int | None:
        """When a resident was last used; None if it is pinned."""
        key = self._key[expert]
        return None if key == NEVER else key & ((1 << _USE_BITS) - 1)

    def claim(self, expert: int, group: int) -> bool:
        """A slot for an absent expert, which is pinned afterwards; False if there is none."""
        if self.free[group]:
            self.free[group] -= 1
        else:
            victim = self._first[group] + int(self._smallest[group]())
            if self._key[victim] == NEVER:
                return False
            self.vacate(victim, group)
            self.free[group] -= 1
            if self.evicted is not None:
                self.evicted.append(victim)
        self.here[expert] = 1
        return True

    def vacate(self, expert: int, group: int) -> None:
        """A resident leaves its slot."""
        self.here[expert] = 0
        self._key[expert] = NEVER
        self.free[group] += 1

    def pin(self, expert: int) -> None:
        self._key[expert] = NEVER

    def unpin(self, expert: int, use: int) -> None:
        """`use` is the time of its last use, from tick()."""
        self._key[expert] = self.above[expert] | use

    def tick(self) -> int:
        self._clock += 1
        return self._clock

    def _touch(self, experts: Sequence[int]) -> None:
        key, above, clock = self._key, self.above, self._clock
        for e in experts:
            clock += 1
            key[e] = above[e] | clock
        self._clock = clock

    def _load(self, hits: list[int], missing: list[int], group: int) -> None:
        if len(hits) + len(missing) > self.slots[group]:
            self._load_in_passes(hits, missing, group)
            return
        for e in hits:
            self._key[e] = NEVER
        for e in missing:
            self.claim(e, group)
        self._touch(hits)
        self._touch(missing)

    def _load_in_passes(self, hits: list[int], missing: list[int], group: int) -> None:
        used = {}
        for e in hits:
            used[e] = self.tick()
            self.pin(e)
        waiting, loading = deque(missing), deque[int]()

        def begin() -> None:
            while waiting and self.claim(waiting[0], group):
                used[waiting[0]] = self.tick()
                loading.append(waiting.popleft())

        begin()
        computing = hits
        while computing or loading:
            computing = computing or [loading.popleft()]
            for e in computing:
                self.unpin(e, used[e])
            begin()
            computing = []
