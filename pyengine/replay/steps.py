"""A trace as a sequence of steps: tokens one at a time, prompts between them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pyengine.traces import Trace

_CHUNK = 2048


@dataclass(frozen=True)
class PromptStep:
    """A micro-batch of several tokens."""

    experts: list[list[int]]
    """by layer, ascending ids"""
    pairs: list[list[int]]
    """by layer, tokens that chose each"""

    def dense(self, n_expert: int) -> npt.NDArray[np.int64]:
        """int64 [n_layer, n_expert]: pairs of every expert."""
        out = np.zeros((len(self.experts), n_expert), np.int64)
        for row, experts, pairs in zip(out, self.experts, self.pairs, strict=True):
            row[experts] = pairs
        return out


@dataclass(frozen=True)
class Steps:
    """The last tokens of a trace, with the prompts before and among them."""

    ids: npt.NDArray[np.uint16]
    """uint16 [n_token, n_layer, n_expert_used], as recorded"""
    weights: npt.NDArray[np.float32] | None
    """float32, of the shape of ids"""
    tokens: npt.NDArray[np.int32] | None
    """int32 [n_token]: ids in the vocabulary"""
    starts: frozenset[int]
    prompts: tuple[tuple[int, PromptStep], ...]
    """(tokens before it, prompt)"""
    n_expert: int

    @property
    def n_token(self) -> int:
        return len(self.ids)

    @property
    def n_layer(self) -> int:
        return int(self.ids.shape[1])

    def numbers(self, place: list[int]) -> Iterator[list[list[int]]]:
        """For every token, by layer: place[layer] + id, ascending."""
        offsets = np.array(place, np.int64)[None, :, None]
        for first in range(0, self.n_token, _CHUNK):
            chunk = np.sort(self.ids[first : first + _CHUNK], axis=2).astype(np.int64)
            yield from (chunk + offsets).tolist()

    def prompts_at(self) -> dict[int, list[PromptStep]]:
        """By the number of tokens before them."""
        found: dict[int, list[PromptStep]] = {}
        for at, prompt in self.prompts:
            found.setdefault(at, []).append(prompt)
        return found


def steps_of(trace: Trace, n_token: int = 0) -> Steps:
    """The last `n_token` tokens of a trace, 0 for all, and the prompts from the one right before them on."""
    n_layer = trace.model.n_layer
    first = max(0, len(trace.ids) - n_token) if n_token else 0
    at = trace.prompts.at.tolist()
    prompts = []
    for i in range(bisect_left(at, first), len(at)):
        of_layers = [trace.prompts.of(i, layer, n_layer) for layer in range(n_layer)]
        step = PromptStep([e.tolist() for e, _ in of_layers], [p.tolist() for _, p in of_layers])
        prompts.append((at[i] - first, step))
    starts = trace.starts.tolist()
    return Steps(
        ids=trace.ids[first:],
        weights=trace.weights[first:].astype(np.float32) if len(trace.weights) else None,
        tokens=trace.tokens[first:] if len(trace.tokens) else None,
        starts=frozenset(s - first for s in starts[bisect_left(starts, first) : bisect_right(starts, len(trace.ids))]),
        prompts=tuple(prompts),
        n_expert=trace.model.n_expert,
    )
