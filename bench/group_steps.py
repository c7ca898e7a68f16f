"""Steps of several tokens put together from tokens recorded one at a time, and what lies in slots when each layer of a
step is looked up."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from pyengine.policies import DEFAULT_POLICY, CacheShape, as_one_text, make_policy
from pyengine.traces import Trace

Indices = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Steps:
    """Steps of like size that follow each other."""

    kind: str
    """"texts": one token of each of several texts; "chunk": tokens of one text that follow each other"""
    tokens: Indices
    """int64 [n_step, size]: token numbers of the trace"""
    before: Indices
    """int64 [n_step, size]: tokens of the same texts in the step before"""

    @property
    def size(self) -> int:
        return int(self.tokens.shape[1])


def spans(trace: Trace) -> list[tuple[int, int]]:
    """(first token, number of tokens) of each text."""
    bounds = np.append(trace.starts, len(trace.ids))
    return [(int(a), int(b - a)) for a, b in pairwise(bounds)]


def of_texts(texts: list[tuple[int, int]], size: int, length: int, seed: int = 0) -> Steps:
    """Groups of `size` texts, `length` steps each; every text from some place on, for lines of a batch are at various
    ones."""
    random = np.random.default_rng(seed)
    texts = [texts[i] for i in random.permutation(len(texts))]
    groups = []
    for first in range(0, len(texts) - size + 1, size):
        begins = [at + int(random.integers(1, n - length + 1)) for at, n in texts[first : first + size]]
        groups.append(np.array(begins) + np.arange(length)[:, None])
    tokens = np.concatenate(groups)
    return Steps("texts", tokens, tokens - 1)


def of_chunks(texts: list[tuple[int, int]], size: int) -> Steps:
    """Chunks of `size` tokens; of a text's first chunk, which no other precedes, `before` is the chunk itself."""
    groups = [
        at + np.arange(begin, begin + size) for at, n in texts for begin in range(0, n - size + 1, size) if size <= n
    ]
    tokens = np.array(groups)
    first = np.isin(tokens[:, 0], [at for at, _ in texts])
    return Steps("chunk", tokens, np.where(first[:, None], tokens, tokens - size))


def pairs_of(trace: Trace, steps: Steps) -> npt.NDArray[np.int64]:
    """int64 [n_step, n_layer, n_expert]: tokens of the step that use each expert."""
    n_layer, n_expert = trace.model.n_layer, trace.model.n_expert
    out = np.zeros((len(steps.tokens), n_layer, n_expert), np.int64)
    layers = np.arange(n_layer)[None, :, None]
    for step, tokens in enumerate(steps.tokens):
        np.add.at(out[step], (layers, trace.ids[tokens].astype(np.int64)), 1)
    return out


def residents(
    pairs: npt.NDArray[np.int64], steps: Steps, n_used: int, slots: int
) -> tuple[Flags, npt.NDArray[np.float32]]:
    """What lies in slots that all layers share when each layer's experts are looked up, under the engine's rules: a
    victim has the lowest priority, ties by oldest use, and is not wanted by the layer itself; nothing is fetched ahead.

    Args:
        pairs: of the steps, see pairs_of; n_used: experts per token and layer; slots: of the cache.

    Returns:
        (bool [n_step, n_layer, n_expert], float32 likewise: the priorities by then).
    """
    n_step, n_layer, n_expert = pairs.shape
    policy = make_policy(DEFAULT_POLICY, CacheShape(n_layer, n_expert, n_used, slots))
    out = np.zeros(pairs.shape, bool)
    priorities = np.zeros(pairs.shape, np.float32)
    held = np.zeros(n_layer * n_expert, bool)
    used = np.zeros(held.size)  # when, in layers
    priority = np.zeros(held.size)
    for step in range(n_step):
        priorities[step] = priority.reshape(n_layer, n_expert)
        for layer in range(n_layer):
            mine = slice(layer * n_expert, (layer + 1) * n_expert)
            out[step, layer] = held[mine]
            wanted = np.flatnonzero(pairs[step, layer]) + mine.start
            there = np.flatnonzero(held)
            leave = np.setdiff1d(there, wanted, assume_unique=True)
            n = max(0, len(there) + int((~held[wanted]).sum()) - slots)
            held[leave[np.lexsort((used[leave], priority[leave]))[:n]]] = False
            held[wanted] = True
            used[wanted] = step * n_layer + layer
        if steps.kind == "texts" and steps.size > 1:
            policy.observe_prompt(as_one_text(pairs[step], n_used, (1,) * steps.size))
        else:
            policy.observe_prompt(pairs[step])
        priority = policy.priorities().astype(np.float64).reshape(-1)
    return out, priorities
