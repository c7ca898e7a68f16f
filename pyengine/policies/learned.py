"""Learned odds: how probable it is that an expert is wanted again soon, learned from the routing of the same model.

Uses of every expert are averaged over several half-lives: s[h, layer, expert], the share of recent tokens that used it.
The log odds that an expert is used a geometrically distributed time ahead are

    bias[e] + sum_h mix[h] log(s[h, e] + floor[h])       its own frequency and recency
            + sum_h,i beside[h, i, e] s[h, i]            experts i of its layer: they come together or after one another
            + tanh(offset + sum_h,l,i into[l, h, i] s[h, l, i]) . out[e]      the state of the whole model: the subject

They are the priority; being odds, they compare across layers too. Only expert ids are needed. The second and third sum
are linear in s, so a token costs a few rows of their matrices. Before anything is learned only the first line counts,
with one set of weights for all experts: frequencies of several half-lives.

Learning is logistic regression by mini-batch Adam (arXiv 1412.6980). That a regression towards coming uses can stand in
for Belady's choice is from LRB (NSDI '20); here only experts count that could be evicted, those the token does not use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from pyengine.errors import PyengineError
from pyengine.policies.policy import CacheShape, Policy
from pyengine.traces import Trace

Floats: TypeAlias = npt.NDArray[np.float32]
Parameters: TypeAlias = dict[str, Floats]

#: Tokens after which a use counts half; 0: only those of the latest token count.
HALF_LIVES = (0, 2, 6, 20, 80, 300)
_KEEP = np.array([0.5 ** (1 / h) if h else 0.0 for h in HALF_LIVES], np.float32)
_GAIN = 1 - _KEEP
_FLOOR = np.array([0.1] + [0.02] * 5, np.float32)
#: Weights of the half-lives before anything is learned: those that gpt-oss-20b's traces gave, roughly.
_MIX = np.array([0, 0, 0.2, 0.4, 0.25, 0.15], np.float32)
#: An average below this is none. Denormal numbers would make a CPU a hundred times slower.
_TINY = np.float32(1e-7)
#: Units that stand for the state of the whole model.
_UNITS = 64

#: How far ahead uses count: one n tokens ahead by this to the power n.
_REACH = 0.85
#: Tokens that are looked at for it.
_AHEAD = 20

#: Streams of tokens that are learned from at once, and the fewest tokens each of them must have.
_STREAMS, _LEAST = 256, 64
#: Tokens of each stream that are unpacked at once.
_BLOCK = 32
#: Streams times layers times experts, at most: some hundred megabytes.
_CELLS = 1 << 20
#: Tokens from which on the averages of a stream mean something.
_WARM_UP = 100
#: Steps of Adam, at least and at most as many passes over the trace; its rate at first; decay of the large matrices.
_STEPS, _PASSES = 1600, (4, 24)
_RATE, _DECAY = 3e-3, 0.1
_MATRICES = ("beside", "into", "out")
#: Of the tokens, the share that judges.
_JUDGES = 0.1


class LearnedPolicyError(PyengineError, ValueError):
    """What a policy learned belongs to another model, or is damaged; or a trace does."""


def _blank(shape: CacheShape, seed: int = 0) -> Parameters:
    """Parameters before anything is learned; float32.

    bias [n_layer, n_expert], mix [h], beside [n_layer, h * n_expert, n_expert], into [n_layer * h * n_expert, units],
    offset [units], out [units, n_layer * n_expert].
    """
    n_layer, n_expert, n = shape.n_layer, shape.n_expert, len(HALF_LIVES)
    into = np.random.default_rng(seed).standard_normal((n_layer * n * n_expert, _UNITS), np.float32)
    return {
        "bias": np.zeros((n_layer, n_expert), np.float32),
        "mix": _MIX.copy(),
        "beside": np.zeros((n_layer, n * n_expert, n_expert), np.float32),
        "into": into * np.float32(0.05),
        "offset": np.zeros(_UNITS, np.float32),
        "out": np.zeros((_UNITS, n_layer * n_expert), np.float32),
    }


class LearnedPolicy(Policy):
    """
    Args:
        learned: what save() gave. Raises LearnedPolicyError unless it fits the shape.
    """

    def __init__(self, shape: CacheShape, learned: Mapping[str, npt.NDArray[Any]] | None = None) -> None:
        self._shape = shape
        self._rows = np.arange(shape.n_layer)[:, None]
        self._uses = np.full((len(HALF_LIVES), shape.n_layer, shape.n_expert), _TINY, np.float32)
        self._take(_blank(shape))
        if learned is not None:
            self.load(learned)

    def begin_sequence(self) -> None:
        pass  # short half-lives forget by themselves; what the long ones hold is mostly true of the next text too

    def observe(self, ids: npt.NDArray[np.uint16], weights: npt.NDArray[np.float32] | None) -> None:
        self._uses *= _KEEP[:, None, None]
        self._uses[:, self._rows, ids] += _GAIN[:, None, None]
        np.maximum(self._uses, _TINY, out=self._uses)
        if self._learned:
            self._beside *= _KEEP[:, None]
            self._beside += self._beside_rows[self._rows, ids].sum(axis=1)
            self._units *= _KEEP[:, None]
            self._units += self._unit_rows[self._rows, ids].sum(axis=(0, 1))

    def observe_prompt(self, pairs: npt.NDArray[np.int64]) -> None:
        """As if the prompt's tokens had been decoded, each with the average of them all."""
        n_used = self._shape.n_expert_used
        sums = pairs.sum(axis=1, keepdims=True)  # llama.cpp may have dropped tokens before the last layer
        share = (pairs * (n_used / np.maximum(sums, 1))).astype(np.float32)
        kept = _KEEP[:, None, None] ** (sums / n_used).astype(np.float32)
        self._uses = np.maximum(self._uses * kept + share * (1 - kept), _TINY)
        self._project()

    def priorities(self) -> Floats:
        known = self._parameters
        odds: Floats = np.tensordot(known["mix"], np.log(self._uses + _FLOOR[:, None, None]), 1)
        odds += known["bias"]
        if self._learned:
            odds += self._beside.sum(axis=1)
            odds += (np.tanh(known["offset"] + self._units.sum(axis=0)) @ known["out"]).reshape(odds.shape)
        return odds

    def save(self) -> dict[str, npt.NDArray[Any]]:
        """What was learned: float16 arrays by name, half_lives among them. Empty if nothing was."""
        if not self._learned:
            return {}
        halves: dict[str, npt.NDArray[Any]] = {name: a.astype("<f2") for name, a in self._parameters.items()}
        return {**halves, "half_lives": np.array(HALF_LIVES, "<f2")}

    def load(self, learned: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go on from what save() gave. Raises LearnedPolicyError unless it fits; nothing is changed then."""
        if not learned:
            return
        arrays = {name: np.asarray(learned[name], np.float32) for name in learned}
        wanted = {name: a.shape for name, a in self._parameters.items()} | {"half_lives": (len(HALF_LIVES),)}
        if {name: a.shape for name, a in arrays.items()} != wanted:
            raise LearnedPolicyError("what the cache policy learned belongs to another model")
        if not all(np.isfinite(a).all() for a in arrays.values()):
            raise LearnedPolicyError("what the cache policy learned is damaged: not all of it are numbers")
        if not np.array_equal(arrays.pop("half_lives"), np.array(HALF_LIVES, np.float32)):
            raise LearnedPolicyError("what the cache policy learned is of another version")
        self._take(arrays, learned=True)

    def fit(self, trace: Trace, stop: Callable[[], bool] = lambda: False) -> bool:
        """Learn from a trace of the same model, going on from what is known. Other calls must wait meanwhile.

        The last tenth of the tokens judges: only what predicts those better than what was known is taken.

        Args:
            stop: asked now and then; True ends learning early.

        Returns: whether anything was learned.

        Raises:
            LearnedPolicyError: the trace is of a model with other numbers of layers or experts.
        """
        model, shape = trace.model, self._shape
        if (model.n_layer, model.n_expert) != (shape.n_layer, shape.n_expert):
            raise LearnedPolicyError("the trace belongs to a model with other numbers of layers or experts")
        found = _learn(self._parameters, trace, stop)
        if found is not None:
            self._take(found, learned=True)
        return found is not None

    def _take(self, parameters: Parameters, learned: bool = False) -> None:
        """Use `parameters` from now on. A token's rows of them are laid side by side: [n_layer, n_expert, h, ...]."""
        n_layer, n_expert, n = self._shape.n_layer, self._shape.n_expert, len(HALF_LIVES)
        self._parameters, self._learned = parameters, learned
        if learned:
            gain = _GAIN[:, None]
            beside = parameters["beside"].reshape(n_layer, n, n_expert, n_expert).swapaxes(1, 2)
            self._beside_rows = np.ascontiguousarray(beside * gain)
            into = parameters["into"].reshape(n_layer, n, n_expert, _UNITS).swapaxes(1, 2)
            self._unit_rows = np.ascontiguousarray(into * gain)
            self._project()

    def _project(self) -> None:
        """The sums over s, anew: [n_layer, h, n_expert] and [h, units]."""
        if self._learned:
            self._beside = np.einsum("hli,lihe->lhe", self._uses, self._beside_rows, optimize=True) / _GAIN[:, None]
            self._units = np.einsum("hli,lihu->hu", self._uses, self._unit_rows, optimize=True) / _GAIN[:, None]


class _Batch(NamedTuple):
    uses: Floats
    """float32 [n, n_layer, h, n_expert]: s after one token each"""
    ahead: Floats
    """float32 [n, n_layer, n_expert]: the part of the time after the next token that uses each expert"""
    counts: Floats
    """float32 [n, n_layer, n_expert]: 1 where that is known and the next token leaves the expert alone, else 0"""


def _batches(
    ids: npt.NDArray[np.uint16], starts: npt.NDArray[np.int64], n_expert: int, offset: int
) -> Iterator[_Batch]:
    """Walk along many parts of a trace at once, a token each, from `offset` on and around its end."""
    n_token, n_layer, _ = ids.shape
    streams = max(1, min(_STREAMS, n_token // _LEAST, _CELLS // (n_layer * n_expert)))
    length = n_token // streams
    first = offset + np.arange(streams) * length
    tokens = np.arange(n_token)
    left = np.append(starts, n_token)[np.searchsorted(starts, tokens, "right")] - tokens  # in the sequence
    uses = np.full((streams, n_layer, len(HALF_LIVES), n_expert), _TINY, np.float32)
    for begin in range(-_WARM_UP, length, _BLOCK):
        n = min(_BLOCK, length - begin)
        at = (first + np.arange(begin, begin + n + 1 + _AHEAD)[:, None]) % n_token
        used = np.zeros((*at.shape, n_layer, n_expert), np.bool_)
        np.put_along_axis(used, ids[at].astype(np.int64), True, axis=3)
        aheads = _aheads(used, n)
        for i in range(n):
            uses *= _KEEP[:, None]
            uses += used[i][:, :, None] * _GAIN[:, None]
            np.maximum(uses, _TINY, out=uses)
            if begin + i >= 0:
                known = (left[at[i + 1]] > _AHEAD)[:, None, None]
                yield _Batch(uses, aheads[i].astype(np.float32), np.float32(1) * (known & ~used[i + 1]))


def _aheads(used: npt.NDArray[np.bool_], n: int) -> npt.NDArray[np.float16]:
    """What comes after each of the tokens 1 to n: float16 [n, ...]."""
    fade = np.float32(_REACH)
    out = np.empty((n, *used.shape[1:]), np.float16)
    ahead = np.zeros(used.shape[1:], np.float32)
    for i in range(len(used) - 1, 0, -1):
        if i <= n:
            out[i - 1] = ahead
        ahead = ahead * fade + used[i] * (1 - fade)
    return out


def _learn(known: Parameters, trace: Trace, stop: Callable[[], bool]) -> Parameters | None:
    """Better parameters than `known`, or None. The trace's last tokens decide which are better."""
    n_expert = trace.model.n_expert
    n_judge = int(len(trace.ids) * _JUDGES)
    if n_judge < _LEAST:
        return None
    n = len(trace.ids) - n_judge
    judges = trace.ids[n:], trace.starts[trace.starts >= n] - n
    ids, starts = trace.ids[:n], trace.starts[trace.starts < n]
    best, least = None, _loss(known, _batches(*judges, n_expert, 0))
    now = {name: a.copy() for name, a in known.items()}
    if not now["bias"].any():
        share = np.stack([np.bincount(layer.ravel(), minlength=n_expert) for layer in ids.swapaxes(0, 1)]) / n
        now["bias"] += (0.3 * (np.log(share + 1e-3) - np.log(1 - share + 1e-3))).astype(np.float32)
    adam, random = _Adam(now), np.random.default_rng(0)
    length = n // max(1, min(_STREAMS, n // _LEAST, _CELLS // now["bias"].size))
    passes = int(np.clip(_STEPS / length, *_PASSES))
    for p in range(passes):
        for i, batch in enumerate(_batches(ids, starts, n_expert, int(random.integers(n)))):
            if stop():
                return best
            adam.step(_gradients(now, batch), _RATE * 0.5 * (1 + np.cos(np.pi * (p + i / length) / passes)))
        loss = _loss(now, _batches(*judges, n_expert, 0))
        if loss < least:
            best, least = {name: a.copy() for name, a in now.items()}, loss
    return best


class _Forward(NamedTuple):
    odds: Floats
    logs: Floats
    near: Floats
    units: Floats


def _forward(known: Parameters, uses: Floats) -> _Forward:
    """The log odds [n, n_layer, n_expert] of a batch, and what their gradients need."""
    n, n_layer, _, n_expert = uses.shape
    logs = np.log(uses + _FLOOR[:, None])
    near = np.ascontiguousarray(uses.reshape(n, n_layer, -1).swapaxes(0, 1))
    units = np.tanh(uses.reshape(n, -1) @ known["into"] + known["offset"])
    odds = np.einsum("h,blhe->ble", known["mix"], logs, optimize=True) + known["bias"]
    odds += np.matmul(near, known["beside"]).swapaxes(0, 1)
    odds += (units @ known["out"]).reshape(n, n_layer, n_expert)
    return _Forward(odds, logs, near, units)


def _loss(known: Parameters, batches: Iterator[_Batch]) -> float:
    """Mean logistic loss."""
    loss = counts = 0.0
    for batch in batches:
        odds = _forward(known, batch.uses).odds
        loss += float(np.sum(batch.counts * (np.logaddexp(0, odds) - batch.ahead * odds), dtype=np.float64))
        counts += float(batch.counts.sum(dtype=np.float64))
    return loss / counts if counts else 0.0


def _gradients(known: Parameters, batch: _Batch) -> Parameters:
    """Of the logistic loss, a token's experts summed up, tokens averaged."""
    uses = batch.uses
    odds, logs, near, units = _forward(known, uses)
    error = batch.counts * (1 / (1 + np.exp(-odds)) - batch.ahead) / np.float32(len(uses))
    flat = error.reshape(len(uses), -1)
    back = (flat @ known["out"].T) * (1 - units * units)
    return {
        "bias": error.sum(axis=0),
        "mix": np.einsum("ble,blhe->h", error, logs, optimize=True),
        "beside": np.matmul(near.swapaxes(1, 2), error.swapaxes(0, 1)),
        "into": uses.reshape(len(uses), -1).T @ back,
        "offset": back.sum(axis=0),
        "out": units.T @ flat,
    }


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
