"""Which guesses are worth a prefetch: the rules of the native engine (prefetcher.cpp).

A guess is admitted if guesses of its rank about absent experts came true often enough of late, and if no more are under
way for its layer than have been found to arrive in time.
"""

from __future__ import annotations

from collections.abc import Sequence

#: Of a rank's record with every guess: about the last fifty count.
_FADING = 0.98
#: What is believed before there are guesses, and how many guesses it is worth.
_PRIOR, _PRIOR_WEIGHT = 0.5, 8.0
_FIRST_ROOM, _MOST_ROOM = 2.0, 16.0

#: A guess is admitted from this chance on.
LEAST_CHANCE = 0.4


class Admission:
    """
    Args:
        n_layer, n_rank: layers, and guesses about each.
        least_chance: of a guess to come true, 0 to 1; 0 admits all that there is room for.
    """

    def __init__(self, n_layer: int, n_rank: int, least_chance: float = LEAST_CHANCE) -> None:
        self._tried = [[0.0] * n_rank for _ in range(n_layer)]
        self._right = [[0.0] * n_rank for _ in range(n_layer)]
        self._least = least_chance
        self._room = _FIRST_ROOM

    def likely(self, layer: int, rank: int) -> bool:
        """Whether a guess of this rank comes true often enough."""
        right = self._right[layer][rank] + _PRIOR_WEIGHT * _PRIOR
        return right >= self._least * (self._tried[layer][rank] + _PRIOR_WEIGHT)

    def has_room(self, n_under_way: int) -> bool:
        """Whether one more prefetch for a layer is likely to arrive in time."""
        return n_under_way + 1 <= self._room

    def judge(self, layer: int, guesses: Sequence[tuple[int, int]], wanted: set[int]) -> None:
        """The layer's router has spoken; `guesses` are (expert, rank) of those that were absent."""
        tried, right = self._tried[layer], self._right[layer]
        for expert, rank in guesses:
            tried[rank] = _FADING * tried[rank] + 1
            right[rank] = _FADING * right[rank] + (expert in wanted)

    def arrived(self, n_begun: int, n_not_moved: int) -> None:
        """Of a layer's prefetches, so many were begun, and so many had bytes to move when its router spoke."""
        if n_not_moved:
            self._room = max(1.0, 0.9 * self._room)
        elif n_begun and n_begun + 1 > self._room:
            self._room = min(_MOST_ROOM, self._room + 0.25)
