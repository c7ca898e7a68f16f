"""Which guesses are worth a prefetch: the rules of the native engine (prefetcher.cpp).

A guess is admitted if guesses of its rank, and about experts of its standing with the cache policy, came true often
enough of late when they were absent, and if no more are under way for its layer than have been found to arrive in time.
"""

from __future__ import annotations

from collections.abc import Iterable

#: Of a record's entry with every guess: about the last fifty count.
_FADING = 0.98
#: What is believed before there are guesses, and how many guesses it is worth.
_PRIOR, _PRIOR_WEIGHT = 0.5, 8.0
_FIRST_ROOM, _MOST_ROOM = 2.0, 16.0

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
        self._ranks = [_Record(n_rank) for _ in range(n_layer)]
        self._standings = [_Record(STANDINGS) for _ in range(n_layer)]
        self._least = least_chance
        self._room = _FIRST_ROOM

    def likely(self, layer: int, rank: int, standing: int) -> bool:
        """Whether such a guess comes true often enough. Rank and standing are taken as independent witnesses: their
        odds multiply."""
        standings = self._standings[layer]
        both = _odds(self._ranks[layer].chance(rank)) * _odds(standings.chance(standing)) / _odds(standings.overall())
        return both >= self._least * (1 + both)

    def has_room(self, n_under_way: int) -> bool:
        """Whether one more prefetch for a layer is likely to arrive in time."""
        return n_under_way + 1 <= self._room

    def judge(self, layer: int, guesses: Iterable[tuple[int, int, int]], wanted: set[int]) -> None:
        """The layer's router has spoken; `guesses` are (expert, rank, standing) of those that were absent."""
        for expert, rank, standing in guesses:
            self._ranks[layer].add(rank, expert in wanted)
            self._standings[layer].add(standing, expert in wanted)

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

    def chance(self, kind: int) -> float:
        return (self._right[kind] + _PRIOR_WEIGHT * _PRIOR) / (self._tried[kind] + _PRIOR_WEIGHT)

    def overall(self) -> float:
        return (sum(self._right) + _PRIOR_WEIGHT * _PRIOR) / (sum(self._tried) + _PRIOR_WEIGHT)

    def add(self, kind: int, was_right: bool) -> None:
        self._tried[kind] = _FADING * self._tried[kind] + 1
        self._right[kind] = _FADING * self._right[kind] + was_right


def _odds(chance: float) -> float:
    within = min(max(chance, 0.01), 0.99)
    return within / (1 - within)
