"""How the learned policy learns: from a trace of the same model, by logistic regression with mini-batches and Adam
(arXiv 1412.6980).

What is learned is how soon each expert is used again. That such a regression can stand in for Belady's choice is from
LRB (NSDI '20); here only experts count that could be evicted, those the token does not use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from pyengine.policies.adapting import Floats
from pyengine.policies.batches import Batch, batches, n_streams, shuffled
from pyengine.policies.learned import (
    FLOOR,
    HALF_LIVES,
    LearnedPolicy,
    LearnedPolicyError,
    Parameters,
)
from pyengine.traces import Trace

#: Steps over which the rate rises.
_SLOW_START = 50
#: Batches times streams times layers times experts that wait to be shuffled, at most: some 250 MB.
_WAITING = 6 << 20
#: Steps of Adam, at least and at most as many passes over the trace; its rate at first; decay of the matrices.
_STEPS, _PASSES = 1600, (4, 24)
_RATE, _DECAY = 3e-3, 1.0
_MATRICES = ("embed", "into", "out")
#: Share of the experts and of the units that a step does without, so that none relies on few others.
_DROPPED = 0.2
#: Of the tokens, the share that judges.
_JUDGES = 0.1
#: A trace of fewer tokens teaches nothing that is true of other texts: of the bundled model 1,000 did harm.
FEWEST = 10_000


def fit(
    policy: LearnedPolicy,
    trace: Trace,
    stop: Callable[[], bool] = lambda: False,
    say: Callable[[float], None] = lambda share: None,
) -> bool:
    """Let a policy learn from a trace of the same model, going on from what it knows; nobody may use it meanwhile.

    The last tenth of the tokens judges: only what orders experts better for them than what was known is taken.

    Args:
        stop: asked now and then; True ends learning early.
        say: told now and then what part of it is done, from 0 to 1.

    Returns: whether anything was learned. Fewer than FEWEST tokens teach nothing.

    Raises:
        LearnedPolicyError: the trace is of a model with other numbers of layers or experts.
    """
    model, shape = trace.model, policy.shape
    if (model.n_layer, model.n_expert) != (shape.n_layer, shape.n_expert):
        raise LearnedPolicyError("the trace belongs to a model with other numbers of layers or experts")
    found = _learn(policy.parameters, trace, stop, say)
    if found is not None:
        policy.take(found)
    return found is not None


class _Forward(NamedTuple):
    odds: Floats
    logs: Floats
    inputs: Floats
    units: Floats


def _forward(known: Parameters, batch: Batch, kept: Floats | None = None, alive: Floats | None = None) -> _Forward:
    """The log odds [n, x] of a batch, and what their gradients need."""
    n = len(batch.uses)
    logs = batch.uses + FLOOR
    np.log(logs, out=logs)
    odds = batch.where @ known["bias"] + np.matmul((batch.where @ known["mix"])[:, None], logs)[:, 0]
    embed = known["embed"] if kept is None else known["embed"] * kept[:, None]
    inputs = np.concatenate([(batch.uses.reshape(-1, len(embed)) @ embed).reshape(n, -1), batch.where], axis=1)
    units = np.tanh(inputs @ known["into"] + known["offset"])
    odds += (units if alive is None else units * alive) @ known["out"]
    return _Forward(odds, logs, inputs, units)


def _lost(known: Parameters, batches: Iterator[Batch], n_expert: int) -> float:
    """Of the coming uses, the share by experts in the lower half of their layer: what half the slots would miss. Only
    the order counts, since what is not learned yet gives no true odds."""
    lost = uses = 0.0
    for batch in batches:
        odds = _forward(known, batch).odds.reshape(len(batch.uses), -1, n_expert)
        coming = (batch.counts * batch.ahead).reshape(odds.shape)
        lost += float(np.sum(coming, where=odds < np.median(odds, axis=2, keepdims=True), dtype=np.float64))
        uses += float(np.sum(coming, dtype=np.float64))
    return lost / uses if uses else 0.0


def _gradients(known: Parameters, batch: Batch, random: np.random.Generator) -> Parameters:
    """Of the logistic loss, a token's experts summed up, tokens averaged."""
    n, width = len(batch.uses), known["embed"].shape[1]
    n_in = len(HALF_LIVES) * width
    spared = np.float32(1 / (1 - _DROPPED))
    kept = spared * (random.random(batch.uses.shape[2:], np.float32) >= _DROPPED)
    alive = spared * (random.random((n, len(known["offset"])), np.float32) >= _DROPPED)
    odds, logs, inputs, units = _forward(known, batch, kept, alive)
    error = batch.counts * (1 / (1 + np.exp(-odds)) - batch.ahead) / np.float32(n)
    back = (error @ known["out"].T) * alive * (1 - units * units)
    towards = (back @ known["into"][:n_in].T).reshape(-1, width)
    return {
        "bias": batch.where.T @ error,
        "mix": batch.where.T @ np.matmul(logs, error[:, :, None])[:, :, 0],
        "embed": (batch.uses.reshape(len(towards), -1).T @ towards) * kept[:, None],
        "into": inputs.T @ back,
        "offset": back.sum(axis=0),
        "out": (units * alive).T @ error,
    }


def _learn(
    known: Parameters, trace: Trace, stop: Callable[[], bool], say: Callable[[float], None]
) -> Parameters | None:
    """Better parameters than `known`, or None. The trace's last tokens decide which are better."""
    n_expert = trace.model.n_expert
    n_judge = int(len(trace.ids) * _JUDGES)
    if len(trace.ids) < FEWEST:
        return None
    n = len(trace.ids) - n_judge
    judges = trace.ids[n:], trace.starts[trace.starts >= n] - n
    ids, starts = trace.ids[:n], trace.starts[trace.starts < n]
    best, least = None, _lost(known, batches(*judges, n_expert, 0), n_expert)
    now = {name: a.copy() for name, a in known.items()}
    if not now["bias"].any():
        share = np.concatenate([np.bincount(layer.ravel(), minlength=n_expert) for layer in ids.swapaxes(0, 1)]) / n
        now["bias"][-1] = 0.3 * (np.log(share + 1e-3) - np.log(1 - share + 1e-3))
    adam, random = _Adam(now), np.random.default_rng(0)
    width = now["bias"].shape[1]
    streams = n_streams(n, width)
    length = n // streams
    waiting = max(1, min(length // 2, _WAITING // (streams * width)))
    passes = int(np.clip(_STEPS / length, *_PASSES))
    for p in range(passes):
        walk = batches(ids, starts, n_expert, int(random.integers(n)))
        for i, batch in enumerate(shuffled(walk, random, waiting)):
            if stop():
                return best
            done = (p + i / length) / passes
            say(done)
            rate = _RATE * 0.5 * (1 + np.cos(np.pi * done)) * min(1.0, (p * length + i + 1) / _SLOW_START)
            adam.step(_gradients(now, batch, random), rate)
        lost = _lost(now, batches(*judges, n_expert, 0), n_expert)
        if lost < least:
            best, least = {name: a.copy() for name, a in now.items()}, lost
    return best


class _Adam:
    """First and second moments with decays 0.9 and 0.999, decoupled weight decay (arXiv 1711.05101); in place."""

    def __init__(self, weights: Parameters) -> None:
        self._weights = weights
        self._first = {name: np.zeros_like(w) for name, w in weights.items()}
        self._second = {name: np.zeros_like(w) for name, w in weights.items()}
        self._n = 0

    def step(self, gradients: Parameters, rate: float) -> None:
        self._n += 1
        one, two = 1 - 0.9**self._n, 1 - 0.999**self._n
        for name, w in self._weights.items():
            m, v, g = self._first[name], self._second[name], gradients[name]
            m += np.float32(0.1) * (g - m)
            v += np.float32(0.001) * (g * g - v)
            if name in _MATRICES:
                w *= np.float32(1 - rate * _DECAY)
            w -= np.float32(rate / one) * m / (np.sqrt(v / np.float32(two)) + np.float32(1e-8))
