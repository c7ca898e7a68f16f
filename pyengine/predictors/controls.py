"""Predictions from expert ids alone: what gate inputs have to beat, and all there is for the first layer.

Each is causal: it scores a token from tokens before it, and a layer from this token's earlier layers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pyengine.predictors.predictor import PredictorError
from pyengine.traces import Trace

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.uint16]


class OnlinePredictor(Protocol):
    """Scores experts, higher is likelier; only their order within a layer means something."""

    def scores(self, ids: Ids, token: int) -> Floats:
        """float32 [n_layer, n_expert] for the token that is being computed.

        Args:
            ids: uint16 [n_layer, k], its experts; a layer's row may influence later layers only.
            token: its id in the vocabulary, -1 if unknown.
        """
        ...

    def observe(self, ids: Ids, token: int) -> None:
        """Learn from a computed token; arguments as in scores()."""
        ...


class RepeatLast:
    """The experts of the token before."""

    def __init__(self, n_layer: int, n_expert: int) -> None:
        self._last = np.zeros((n_layer, n_expert), np.float32)

    def scores(self, ids: Ids, token: int) -> Floats:
        return self._last

    def observe(self, ids: Ids, token: int) -> None:
        self._last = np.zeros_like(self._last)
        # Routers name the most probable first; its rank breaks ties when more are asked for than were used.
        np.put_along_axis(self._last, ids.astype(np.int64), np.linspace(1, 0.5, ids.shape[1], dtype=np.float32), axis=1)


class Popularity:
    """How often each expert was used, older uses counting less."""

    def __init__(self, n_layer: int, n_expert: int, half_life: float = 2000.0) -> None:
        self._counts = np.zeros((n_layer, n_expert), np.float32)
        self._rows = np.arange(n_layer)[:, None]
        self._keep = np.float32(0.5 ** (1 / half_life))

    def add(self, layers: npt.NDArray[np.int64], counts: Floats) -> None:
        """Count uses from elsewhere: float32 [len(layers), n_expert]."""
        self._counts[layers] += counts

    def scores(self, ids: Ids, token: int) -> Floats:
        return self._counts.copy()

    def observe(self, ids: Ids, token: int) -> None:
        self._counts *= self._keep
        self._counts[self._rows, ids] += 1


class CorrelationTable:
    """Klotski's table (arXiv 2502.06888, section 6.2): how often each expert followed each expert of the layer before.

    A layer's scores are the sum over the experts that the layer before has used. The first layer follows the last one
    of the token before.
    """

    def __init__(self, n_layer: int, n_expert: int) -> None:
        self.counts = np.zeros((n_layer, n_expert, n_expert), np.uint32)
        """uint32 [n_layer, expert of the layer before, expert]"""
        self._layers = np.arange(n_layer)
        self._last: Ids | None = None

    def after(self, layer: int, before: Ids) -> Floats:
        """float32 [n_expert]: scores of one layer after the experts `before`, [k], of the layer before it."""
        return np.asarray(self.counts[layer, before].sum(axis=0), np.float32)

    def scores(self, ids: Ids, token: int) -> Floats:
        before = self._before(ids)
        if before is None:
            return np.zeros(self.counts.shape[::2], np.float32)
        return np.asarray(self.counts[self._layers[:, None], before].sum(axis=1), np.float32)

    def observe(self, ids: Ids, token: int) -> None:
        before = self._before(ids)
        if before is not None:
            self.counts[self._layers[:, None, None], before[:, :, None], ids[:, None, :]] += 1
        self._last = ids[-1].copy()

    def _before(self, ids: Ids) -> Ids | None:
        """uint16 [n_layer, k]: for each layer the experts of the one before."""
        return None if self._last is None else np.concatenate([self._last[None], ids[:-1]])


class TokenTable:
    """What each token of the vocabulary used, and popularity where it was not met yet.

    Args:
        layers: the first so many are kept; the others get popularity.
        most: tokens kept; those not met for longest are dropped.
    """

    def __init__(self, n_layer: int, n_expert: int, layers: int = 1, most: int = 1 << 15) -> None:
        self._popular = Popularity(n_layer, n_expert)
        self._layers = min(layers, n_layer)
        self._most = most
        self._rows = np.arange(self._layers)[:, None]
        self._n_expert = n_expert
        self._counts: OrderedDict[int, npt.NDArray[np.uint16]] = OrderedDict()

    def scores(self, ids: Ids, token: int) -> Floats:
        scores = self._popular.scores(ids, token)
        counts = self._counts.get(token)
        if counts is not None:
            # What the token itself used counts above all; popularity orders the rest.
            scores /= np.maximum(scores.max(axis=1, keepdims=True), 1) * 2
            scores[: self._layers] += counts
        return scores

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What was learned: tokens int64 [n], longest unused first, and counts uint16 [n, layers, n_expert]."""
        counts = np.array(list(self._counts.values()), np.uint16).reshape(-1, self._layers, self._n_expert)
        return {"tokens": np.array(list(self._counts), np.int64), "counts": counts}

    def restore(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go on from what arrays() gave. Raises PredictorError if it is of another model, or damaged."""
        tokens, counts = arrays["tokens"], arrays["counts"]
        whole = tokens.ndim == 1 and counts.shape == (len(tokens), self._layers, self._n_expert)
        if not whole or tokens.dtype.kind not in "iu" or counts.dtype != np.uint16:
            raise PredictorError("the table of tokens does not fit this model")
        kept = zip(tokens.tolist()[-self._most :], counts[-self._most :], strict=True)
        self._counts = OrderedDict((token, row.copy()) for token, row in kept)
        popular = counts.sum(axis=0, dtype=np.float32)
        self._popular.add(np.arange(self._layers), popular)

    def observe(self, ids: Ids, token: int) -> None:
        self._popular.observe(ids, token)
        if token < 0:
            return
        counts = self._counts.pop(token, None)
        if counts is None:
            counts = np.zeros((self._layers, self._n_expert), np.uint16)
            if len(self._counts) >= self._most:
                self._counts.popitem(last=False)
        self._counts[token] = counts
        if counts.max() == np.iinfo(np.uint16).max:
            counts //= 2
        counts[self._rows, ids[: self._layers]] += 1


def score_tokens(predictor: OnlinePredictor, trace: Trace, tokens: npt.NDArray[np.int64]) -> Floats:
    """Run a predictor over a trace; float32 [n, n_layer, n_expert], its scores for some tokens, given ascending."""
    out = np.zeros((len(tokens), trace.model.n_layer, trace.model.n_expert), np.float32)
    place = {int(token): i for i, token in enumerate(tokens)}
    for i, ids in enumerate(trace.ids):
        token = int(trace.tokens[i]) if len(trace.tokens) else -1
        at = place.get(i)
        if at is not None:
            out[at] = predictor.scores(ids, token)
        predictor.observe(ids, token)
    return out
