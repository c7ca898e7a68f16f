"""ARC, adaptive replacement (Megiddo and Modha, FAST 2003), as priorities.

A cache keeps experts seen once (T1) and experts seen again (T2), each by age, and remembers as many that it has let go
of (ghosts B1, B2). A use of a ghost says which of the two lists should have been longer; the target size of T1 follows.
The lists are those of a cache that ARC alone rules; what the engine holds may differ a little.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from pyengine.policies.policy import CacheShape, Policy

_T1, _T2, _B1, _B2 = range(4)
_ABSENT = np.int32(np.iinfo(np.int32).max)
#: Stamps are moved back before they could reach _ABSENT.
_LATE = 1 << 30


class ArcLists:
    """The lists of several caches side by side, a row each. The experts of one token come as a set.

    Args:
        capacity: int64 [n_row], slots of each.
        n: experts in a row.
    """

    def __init__(self, capacity: npt.NDArray[np.int64], n: int) -> None:
        self._capacity = capacity
        self._rows = np.arange(len(capacity))[:, None]
        # By list: when an expert in it was last used, _ABSENT if it is in another or in none.
        self._stamps = np.full((4, len(capacity), n), _ABSENT, np.int32)
        self._sizes = np.zeros((4, len(capacity)), np.int64)
        self._target = np.zeros(len(capacity))  # of T1
        self._clock = 0

    def use(self, members: npt.NDArray[np.int64]) -> None:
        """One token used `members`, int64 [n_row, m], distinct in each row."""
        here = self._stamps[:, self._rows, members] != _ABSENT  # [4, n_row, m]
        counts = here.sum(axis=2)
        n_b1, n_b2 = np.maximum(self._sizes[_B1], 1), np.maximum(self._sizes[_B2], 1)
        change = counts[_B1] * np.maximum(1, n_b2 / n_b1) - counts[_B2] * np.maximum(1, n_b1 / n_b2)
        self._target = np.clip(self._target + change, 0, self._capacity)

        known = here.any(axis=0)
        now = np.arange(self._clock, self._clock + members.shape[1], dtype=np.int32)
        self._clock += members.shape[1]
        self._stamps[:, self._rows, members] = _ABSENT
        self._stamps[_T1, self._rows, members] = np.where(known, _ABSENT, now)
        self._stamps[_T2, self._rows, members] = np.where(known, now, _ABSENT)
        self._sizes -= counts
        n_known = known.sum(axis=1)
        self._sizes[_T1] += members.shape[1] - n_known
        self._sizes[_T2] += n_known
        self._evict(members.shape[1] - n_known, counts[_B2] > 0)
        if self._clock > _LATE:
            self._clock //= 2
            np.copyto(self._stamps, np.maximum(self._stamps - self._clock, 0), where=self._stamps != _ABSENT)

    def t1_goes_first(self) -> npt.NDArray[np.bool_]:
        """bool [n_row]: whether the next victim comes from T1."""
        first: npt.NDArray[np.bool_] = self._sizes[_T1] > self._target
        return first

    def listed(self) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """bool [n_row, n] each: experts in T1 and in T2."""
        return self._stamps[_T1] != _ABSENT, self._stamps[_T2] != _ABSENT

    def _evict(self, n_new: npt.NDArray[np.int64], from_b2: npt.NDArray[np.bool_]) -> None:
        """Lists shrink to what they may hold; T1's size before `n_new` experts came is what counts against its
        target."""
        sizes, capacity = self._sizes, self._capacity
        excess = np.maximum(0, sizes[_T1] + sizes[_T2] - capacity)
        over = sizes[_T1] - n_new - self._target
        over_target = np.maximum(from_b2 & (over == 0) & (sizes[_T1] > n_new), np.ceil(over)).astype(np.int64)
        from_t2 = np.minimum(excess - np.minimum(excess, over_target), sizes[_T2])
        self._drop(_T1, excess - from_t2, _B1)
        self._drop(_T2, from_t2, _B2)
        self._drop(_B1, np.minimum(sizes[_B1], np.maximum(0, sizes[_T1] + sizes[_B1] - capacity)))
        self._drop(_B2, np.minimum(sizes[_B2], np.maximum(0, sizes.sum(axis=0) - 2 * capacity)))

    def _drop(self, which: int, n: npt.NDArray[np.int64], ghost: int | None = None) -> None:
        """The oldest `n` [n_row] of each row leave a list, for the list `ghost` if there is one."""
        most = int(n.max())
        if not most:
            return
        stamps = self._stamps[which]
        oldest = np.sort(np.partition(stamps, most - 1, axis=1)[:, :most], axis=1)
        last = oldest[self._rows[:, 0], np.maximum(n - 1, 0)]
        leaving = stamps <= np.where(n > 0, last, -1)[:, None]
        if ghost is not None:
            np.copyto(self._stamps[ghost], stamps, where=leaving)
            self._sizes[ghost] += n
        stamps[leaving] = _ABSENT
        self._sizes[which] -= n


def most_chosen(pairs: npt.NDArray[np.int64], n_used: int) -> Iterator[npt.NDArray[np.uint16]]:
    """A prompt uses nearly everything, and to lists it must not look like one token: two that use what was chosen most,
    the most chosen last. uint16 [n_layer, n_used] each, from `pairs`, int64 [n_layer, n_expert]."""
    order = np.argsort(pairs, axis=1, kind="stable").astype(np.uint16)
    if order.shape[1] >= 2 * n_used:
        yield order[:, -2 * n_used : -n_used]
    yield order[:, -n_used:]


class ArcPolicy(Policy):
    """One cache for all layers, or one for each if they do not share slots.

    What ARC would evict next has priority 1, the other list 2, what it does not keep 0. Within a list ties go by age,
    as in ARC.
    """

    def __init__(self, shape: CacheShape) -> None:
        n_row = shape.n_layer if shape.per_layer else 1
        self._shape = shape
        self._n = shape.n_layer * shape.n_expert // n_row
        self._lists = ArcLists(np.full(n_row, shape.slots // n_row, np.int64), self._n)
        self._offsets = 0 if shape.per_layer else (np.arange(shape.n_layer) * shape.n_expert)[:, None]

    def observe(self, ids: npt.NDArray[np.uint16], weights: npt.NDArray[np.float32] | None) -> None:
        members = ids.astype(np.int64) + self._offsets
        self._lists.use(members if self._shape.per_layer else members.reshape(1, -1))

    def observe_prompt(self, pairs: npt.NDArray[np.int64]) -> None:
        for ids in most_chosen(pairs, self._shape.n_expert_used):
            self.observe(ids, None)

    def priorities(self) -> npt.NDArray[np.float32]:
        t1, t2 = self._lists.listed()
        t1_first = self._lists.t1_goes_first()[:, None]
        worth = t1 * np.where(t1_first, np.float32(1), np.float32(2))
        worth += t2 * np.where(t1_first, np.float32(2), np.float32(1))
        return worth.astype(np.float32).reshape(self._shape.n_layer, self._shape.n_expert)
