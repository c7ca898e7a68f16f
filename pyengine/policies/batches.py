"""A trace as what the learned policy learns from: averages of uses, and what came after them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pyengine.policies.adapting import AHEAD, REACH, Floats
from pyengine.policies.learned import GAIN, Averages

#: Streams of tokens that are learned from at once, and the fewest tokens each of them must have.
_STREAMS, _LEAST = 256, 64
#: Tokens of each stream that are unpacked at once.
_BLOCK = 32
#: Streams times layers times experts, at most: some hundred megabytes.
_CELLS = 1 << 20
#: Tokens from which on the averages of a stream mean something.
_WARM_UP = 100


class Batch(NamedTuple):
    uses: Floats
    """float32 [n, h, x]: s after one token each"""
    where: Floats
    """float32 [n, len(_LENGTHS)]: p"""
    ahead: Floats
    """float32 [n, x]: the part of the time after the next token that uses each expert"""
    counts: Floats
    """float32 [n, x]: 1 where that is known and the next token leaves the expert alone, else 0"""


def n_streams(n_token: int, width: int) -> int:
    """How many parts of a trace of so many tokens, with so many experts in all layers, are walked along at once."""
    return max(1, min(_STREAMS, n_token // _LEAST, _CELLS // width))


def batches(ids: npt.NDArray[np.uint16], starts: npt.NDArray[np.int64], n_expert: int, offset: int) -> Iterator[Batch]:
    """Walk along many parts of a trace at once, a token each, from `offset` on and around its end."""
    n_token, n_layer, _ = ids.shape
    streams = n_streams(n_token, n_layer * n_expert)
    length = n_token // streams
    first = offset + np.arange(streams) * length
    tokens = np.arange(n_token)
    left = np.append(starts, n_token)[np.searchsorted(starts, tokens, "right")] - tokens  # in the sequence
    begins = np.isin(tokens, starts)
    averages = Averages(streams, n_layer * n_expert)
    for begin in range(-_WARM_UP, length, _BLOCK):
        n = min(_BLOCK, length - begin)
        at = (first + np.arange(begin, begin + n + 1 + AHEAD)[:, None]) % n_token
        used = np.zeros((*at.shape, n_layer, n_expert), np.bool_)
        np.put_along_axis(used, ids[at].astype(np.int64), True, axis=3)
        used = used.reshape(*at.shape, -1)
        aheads = _aheads(used, n)
        for i in range(n):
            averages.begin_text(begins[at[i]])
            averages.fade()
            averages.sums += used[i][:, None] * GAIN[:, None]
            if begin + i >= 0:
                known = (left[at[i + 1]] > AHEAD)[:, None]
                uses = averages.sums * averages.scale()[:, :, None]
                yield Batch(
                    uses, averages.where(), aheads[i].astype(np.float32), (known & ~used[i + 1]).astype(np.float32)
                )


def _aheads(used: npt.NDArray[np.bool_], n: int) -> npt.NDArray[np.float16]:
    """What comes after each of the tokens 1 to n: float16 [n, ...]."""
    fade = np.float32(REACH)
    out = np.empty((n, *used.shape[1:]), np.float16)
    ahead = np.zeros(used.shape[1:], np.float32)
    for i in range(len(used) - 1, 0, -1):
        if i <= n:
            out[i - 1] = ahead
        ahead = ahead * fade + used[i] * (1 - fade)
    return out


def shuffled(batches: Iterator[Batch], random: np.random.Generator, n_batch: int) -> Iterator[Batch]:
    """The same tokens in another order: each waits for a random while among those of `n_batch` batches. Batches that
    follow each other are alike, and learning from them one after the other would be learning them by heart."""
    shelf: list[npt.NDArray[Any]] = []
    filled = 0
    for batch in batches:
        n = len(batch.uses)
        if not shelf:
            shelf = [np.empty((n_batch * n, *a.shape[1:]), np.float32) for a in batch]
        if filled < n_batch:
            for room, a in zip(shelf, batch, strict=True):
                room[filled * n : (filled + 1) * n] = a
            filled += 1
            continue
        at = random.choice(n_batch * n, n, replace=False)
        yield Batch(*(room[at] for room in shelf))
        for room, a in zip(shelf, batch, strict=True):
            room[at] = a
    rest = random.permutation(filled * n)
    for i in range(filled):
        yield Batch(*(room[rest[i * n : (i + 1) * n]] for room in shelf))
