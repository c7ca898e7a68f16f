"""Which guesses are worth a prefetch: the rules of the native engine (prefetcher.cpp).

A guess is admitted if guesses of its rank, and about experts of its standing with the cache policy, came true often
enough of late when they were absent, if the part of a read that is hidden in this way outweighs how often what is
pushed out was wanted meanwhile, and if no more are under way for its layer than have been found to arrive in time.
Nothing is read on faith: where a layer has shown little, the others' record counts.
"""

from __future__ import annotations

from collections.abc import Iterable

#: Of a record's entry with every guess: about the last fifty count.
_FADING = 0.98
#: What is believed before there are guesses, and how many guesses it is worth: of a standing, of a guess, and that an
#: expert which is pushed out was needed.
_PRIOR, _UNPROVEN, _UNSEEN, _PRIOR_WEIGHT = 0.5, 0.3, 0.1, 8.0
_FIRST_ROOM, _MOST_ROOM = 2.0, 16.0
#: The part of a wanted expert that its prefetch had brought: at first, how many prefetches that is worth, how many
#: count, and what is never found out when nothing is read.
_MOVED, _MOVED_PRIOR, _MOVED_MEMORY, _LEAST_MOVED = 0.5, 8, 64, 0.1

#: A guess is admitted from this chance on.
LEAST_CHANCE = 0.4

#: Parts of a layer's experts, by priority: 0 are those that the policy would rather keep.
STANDINGS = 8


class Admission:
    """
    Args:
        n_layer, n_rank: layers, and guesses about each.
        least_chance: of a guess to come true, 0 to 1; 0 admits all that there is room for.
    """

    def __init__(self, n_layer: int, n_rank: int, least_chance: float = LEAST_CHANCE) -> None:
        self._all = _Record(n_rank)
        self._ranks = [_Record(n_rank) for _ in range(n_layer)]
        self._standings = [_Record(STANDINGS) for _ in range(n_layer)]
        self._displaced = _Record(1)
        self._watched: dict[int, set[int]] = {}  # by layer
        self._moved, self._n_moved = _MOVED, _MOVED_PRIOR
        self._least = least_chance
        self._room = _FIRST_ROOM

    def chance(self, layer: int, rank: int, standing: int) -> float:
        """Of such a guess to come true. Rank and standing are taken as independent witnesses: their odds multiply."""
        standings = self._standings[layer]
        by_rank = self._ranks[layer].chance(rank, self._all.chance(rank, _UNPROVEN))
        both = _odds(by_rank) * _odds(standings.chance(standing)) / _odds(standings.overall())
        return both / (1 + both)

    def likely(self, chance: float) -> bool:
        """Whether what comes true so often should stay if it is here."""
        return chance >= self._least

    def pays(self, chance: float, leaves: int | None, layer: int) -> bool:
        """Whether an absent expert is worth a read and the slot that it takes. `leaves` is who leaves for it, of
        `layer`; None: nobody. It may be wanted, and when it is read again the next one leaves, and so on."""
        if chance < self._least or leaves is None:
            return chance >= self._least
        self._watched.setdefault(layer, set()).add(leaves)
        needed = min(0.99, self._displaced.chance(0, _UNSEEN))
        return self._least <= 0 or chance * max(_LEAST_MOVED, self._moved) >= needed / (1 - needed)

    def has_room(self, n_under_way: int) -> bool:
        """Whether one more prefetch for a layer is likely to arrive in time."""
        return n_under_way + 1 <= self._room

    def judge(self, layer: int, guesses: Iterable[tuple[int, int, int]], wanted: set[int]) -> None:
        """The layer's router has spoken; `guesses` are (expert, rank, standing) of those that were absent."""
        for expert, rank, standing in guesses:
            self._ranks[layer].add(rank, expert in wanted)
            self._all.add(rank, expert in wanted)
            self._standings[layer].add(standing, expert in wanted)
        for expert in sorted(self._watched.pop(layer, ())):
            self._displaced.add(0, expert in wanted)

    def moved(self, share: float) -> None:
        """A wanted expert's prefetch had brought this share of it."""
        self._n_moved = min(self._n_moved + 1, _MOVED_MEMORY)
        self._moved += (share - self._moved) / self._n_moved

    def arrived(self, n_begun: int, n_not_moved: int) -> None:
        """Of a layer's prefetches, so many were begun, and so many had bytes to move when its router spoke."""
        if n_not_moved:
            self._room = max(1.0, 0.9 * self._room)
        elif n_begun and n_begun + 1 > self._room:
            self._room = min(_MOST_ROOM, self._room + 0.25)


class _Record:
    """How often guesses of each kind came true, old ones fading."""

    def __init__(self, n_kind: int) -> None:
        self._tried, self._right = [0.0] * n_kind, [0.0] * n_kind

    def chance(self, kind: int, belief: float = _PRIOR) -> float:
        return (self._right[kind] + _PRIOR_WEIGHT * belief) / (self._tried[kind] + _PRIOR_WEIGHT)

    def overall(self) -> float:
        return (sum(self._right) + _PRIOR_WEIGHT * _PRIOR) / (sum(self._tried) + _PRIOR_WEIGHT)

    def add(self, kind: int, was_right: bool) -> None:
        self._tried[kind] = _FADING * self._tried[kind] + 1
        self._right[kind] = _FADING * self._right[kind] + was_right


def _odds(chance: float) -> float:
    within = min(max(chance, 0.01), 0.99)
    return within / (1 - within)
