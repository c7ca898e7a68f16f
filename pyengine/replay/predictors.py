"""Predictors that need no gate inputs, and the controls that others are measured against.

A predictor gives scores for one layer of the token that is being decoded. It may look at all tokens before it and at
those layers of it whose routers have spoken. Scores are read as probabilities; zero means not predicted.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pyengine.replay.steps import Steps

Scores = npt.NDArray[np.float32]


class Predictor(Protocol):
    def predict(self, token: int, layer: int, known: int) -> Scores | None:
        """float32 [n_expert] for `layer` of `token`, of which the first `known` layers are known; None: no idea."""
        ...

    def next_token(self, token: int) -> Scores | None:
        """float32 [n_layer, n_expert] for a token none of whose layers is known; None: no idea, or none that is better
        than what a cache policy knows itself."""
        return None

    def observe(self, token: int) -> None:
        """The token was decoded."""
        return


class Simulated(Predictor):
    """Names each expert that will be needed with probability `recall`, and random others in the place of the rest."""

    def __init__(self, steps: Steps, recall: float, seed: int = 0) -> None:
        self._steps, self._recall = steps, recall
        self._chance = np.random.default_rng(seed)

    def predict(self, token: int, layer: int, known: int) -> Scores | None:
        ids = self._steps.ids[token, layer]
        order = self._chance.permutation(self._steps.n_expert)
        found = self._chance.random(len(ids)) < self._recall
        wrong = order[~np.isin(order, ids)][: int((~found).sum())]
        scores = np.zeros(self._steps.n_expert, np.float32)
        scores[ids[found]] = scores[wrong] = max(self._recall, 1e-6)
        return scores


class RepeatLast(Predictor):
    """The experts of the token before."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def predict(self, token: int, layer: int, known: int) -> Scores | None:
        if not token:
            return None
        scores = np.zeros(self._steps.n_expert, np.float32)
        scores[self._steps.ids[token - 1, layer]] = 1
        return scores

    def next_token(self, token: int) -> Scores | None:
        rows = [self.predict(token, layer, 0) for layer in range(self._steps.n_layer)]
        return np.stack([row for row in rows if row is not None]) if token else None


class Popularity(Predictor):
    """The experts used most so far."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._counts = np.zeros((steps.n_layer, steps.n_expert), np.float32)
        self._rows = np.arange(steps.n_layer)[:, None]

    def predict(self, token: int, layer: int, known: int) -> Scores | None:
        scores: Scores = self._counts[layer] / np.float32(max(1, token))
        return scores

    def observe(self, token: int) -> None:
        self._counts[self._rows, self._steps.ids[token]] += 1


class Correlation(Predictor):
    """Counts of (layer, expert of a layer before, expert), updated online (Klotski, arXiv 2502.06888). Where no layer
    before is known, popularity."""

    def __init__(self, steps: Steps, distance: int) -> None:
        self._steps, self._distance = steps, distance
        self._popular = Popularity(steps)
        self._counts = np.zeros((steps.n_layer, steps.n_expert, steps.n_expert), np.float32)
        self._seen = np.zeros((steps.n_layer, steps.n_expert), np.float32)
        self._rows = np.arange(distance, steps.n_layer)[:, None, None]

    def predict(self, token: int, layer: int, known: int) -> Scores | None:
        before = layer - self._distance
        if not 0 <= before < known:
            return self._popular.predict(token, layer, known)
        experts = self._steps.ids[token, before]
        seen = np.maximum(self._seen[before, experts], 1)[:, None]
        scores: Scores = (self._counts[layer, experts] / seen).mean(axis=0)
        return scores

    def observe(self, token: int) -> None:
        ids, d = self._steps.ids[token], self._distance
        self._popular.observe(token)
        self._seen[np.arange(len(ids))[:, None], ids] += 1
        if d < len(ids):
            self._counts[self._rows, ids[:-d, :, None], ids[d:, None, :]] += 1


class TokenTable(Predictor):
    """What the same token of the vocabulary used before; popularity for a token not seen yet."""

    #: Tokens of the vocabulary that are remembered; the one longest unseen makes room.
    MOST = 8192

    def __init__(self, steps: Steps) -> None:
        assert steps.tokens is not None
        self._ids, self._tokens = steps.ids, steps.tokens
        self._popular = Popularity(steps)
        self._shape = (steps.n_layer, steps.n_expert)
        self._rows = np.arange(steps.n_layer)[:, None]
        self._counts: OrderedDict[int, npt.NDArray[np.uint16]] = OrderedDict()
        self._seen: dict[int, int] = {}

    def predict(self, token: int, layer: int, known: int) -> Scores | None:
        word = int(self._tokens[token])
        counts = self._counts.get(word)
        if counts is None:
            return self._popular.predict(token, layer, known)
        scores: Scores = counts[layer] / np.float32(self._seen[word])
        return scores

    def next_token(self, token: int) -> Scores | None:
        word = int(self._tokens[token])
        counts = self._counts.get(word)
        return None if counts is None else (counts / self._seen[word]).astype(np.float32)

    def observe(self, token: int) -> None:
        self._popular.observe(token)
        word = int(self._tokens[token])
        counts = self._counts.setdefault(word, np.zeros(self._shape, np.uint16))
        self._counts.move_to_end(word)
        counts[self._rows, self._ids[token]] += 1
        self._seen[word] = self._seen.get(word, 0) + 1
        if self._seen[word] > np.iinfo(np.uint16).max // 2:
            counts //= 2
            self._seen[word] //= 2
        if len(self._counts) > self.MOST:
            oldest, _ = self._counts.popitem(last=False)
            del self._seen[oldest]


class Given(Predictor):
    """Scores that somebody has computed, e.g. from gate inputs: float [n_token, n_layer, n_expert], NaN or zero where
    nothing is predicted."""

    def __init__(self, scores: npt.NDArray[np.floating]) -> None:
        self._scores = scores

    def predict(self, token: int, layer: int, known: int) -> Scores | None:
        scores: Scores = np.nan_to_num(self._scores[token, layer].astype(np.float32), nan=0.0)
        return scores
