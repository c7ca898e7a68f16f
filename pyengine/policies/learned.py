"""Learned odds: how probable it is that an expert is wanted again soon, learned from the routing of the same model.

Uses of every expert are averaged over several half-lives, over all tokens and over those of the present text:
s[h, x], where x counts the experts of all layers. The log odds that x is used a geometrically distributed time ahead:

    sum_h mix(p)[h] log(s[h, x] + FLOOR[h]) + bias(p)[x]                    its own frequency and recency
    + tanh([s @ embed, of every h; p] @ into + offset) @ out[x]             what else is in use: the subject, the token

p is the position in the text, since the past of the last text says little about this one; mix and bias are linear in
it. Being odds, the priorities compare across layers too. Only expert ids are needed. s @ embed is linear in s, so a
token costs a few rows of `embed` and the products of two vectors with small matrices. Before anything is learned only
the first sum counts, with one set of weights for all experts: frequencies of several half-lives.

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

#: Tokens after which a use counts half; 0: only those of the latest token count. The last _OF_TEXT are of the present
#: text alone, and pulled towards zero as if it had begun with _UNKNOWN tokens that used nothing.
HALF_LIVES = (0, 2, 6, 20, 80, 300, 30, 300)
_OF_TEXT, _UNKNOWN = 2, 4
_KEEP = np.array([0.5 ** (1 / h) if h else 0.0 for h in HALF_LIVES], np.float32)
_GAIN = 1 - _KEEP
_FLOOR = np.array([[0.1 if h == 0 else 0.02] for h in HALF_LIVES], np.float32)
#: Weights of the half-lives before anything is learned: those that gpt-oss-20b's traces gave, roughly.
_MIX = np.array([0, 0, 0.2, 0.4, 0.2, 0.1, 0.05, 0.05], np.float32)
#: The position in a text, seen through exponentials of these lengths (tokens), and 1.
_LENGTHS = np.array([4, 16, 64, 256, np.inf], np.float32)
#: An average below this is none. Denormal numbers would make a CPU a hundred times slower.
_TINY = np.float32(1e-7)
#: Numbers that stand for an expert.
_WIDTH = 96
#: Units that stand for the state of the whole model, at most, and times experts: their matrix is read for each token.
_UNITS, _UNIT_CELLS = 256, 1 << 20

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
_FEWEST = 10_000


class LearnedPolicyError(PyengineError, ValueError):
    """What a policy learned belongs to another model, or is damaged; or a trace does."""


def _blank(n: int, seed: int = 0) -> Parameters:
    """Parameters before anything is learned, of n experts in all layers together; float32."""
    random, n_half, n_length = np.random.default_rng(seed), len(HALF_LIVES), len(_LENGTHS)
    mix = np.zeros((n_length, n_half), np.float32)
    mix[-1] = _MIX
    n_in, n_unit = n_half * _WIDTH + n_length, max(1, min(_UNITS, _UNIT_CELLS // n))
    return {
        "bias": np.zeros((n_length, n), np.float32),
        "mix": mix,
        "embed": random.standard_normal((n, _WIDTH), np.float32) * np.float32(0.3),
        "into": random.standard_normal((n_in, n_unit), np.float32) * np.float32(n_in**-0.5),
        "offset": np.zeros(n_unit, np.float32),
        "out": np.zeros((n_unit, n), np.float32),
    }


class _Averages:
    """s of several streams of tokens. `sums` is float32 [stream, h, x], `position` float32 [stream]."""

    def __init__(self, n_stream: int, n: int) -> None:
        self.sums = np.full((n_stream, len(HALF_LIVES), n), _TINY, np.float32)
        self.position = np.zeros(n_stream, np.float32)

    def begin_text(self, streams: npt.NDArray[Any]) -> None:
        """`streams`: bool [stream] or their numbers."""
        self.sums[streams, -_OF_TEXT:] = _TINY
        self.position[streams] = 0

    def fade(self) -> None:
        """Before a token's uses are added, each worth _GAIN."""
        self.sums *= _KEEP[:, None]
        np.maximum(self.sums, _TINY, out=self.sums)
        self.position += 1

    def absorb(self, pairs: npt.NDArray[np.int64], n_used: int) -> None:
        """To every stream a prompt: int64 [n_layer, n_expert], tokens that chose each expert."""
        chosen = pairs.sum(axis=1, keepdims=True)  # llama.cpp may have dropped tokens before the last layer
        share = (pairs * (n_used / np.maximum(chosen, 1))).astype(np.float32).ravel()
        tokens = np.repeat(chosen / n_used, pairs.shape[1]).astype(np.float32)
        kept = _KEEP[:, None] ** tokens
        self.sums = np.maximum(self.sums * kept + share * (1 - kept), _TINY)
        self.position += tokens.max(initial=0)

    def scale(self) -> Floats:
        """What `sums` must be multiplied by to be averages: float32 [stream, h]."""
        out = np.ones((len(self.position), len(HALF_LIVES)), np.float32)
        keep = _KEEP[-_OF_TEXT:]
        out[:, -_OF_TEXT:] = 1 / (1 - keep ** self.position[:, None] + _UNKNOWN * (1 - keep))
        return out

    def where(self) -> Floats:
        """p: float32 [stream, len(_LENGTHS)]."""
        out: Floats = np.exp(-self.position[:, None] / _LENGTHS)
        return out


class LearnedPolicy(Policy):
    """
    Args:
        learned: what save() gave. Raises LearnedPolicyError unless it fits the shape.
    """

    def __init__(self, shape: CacheShape, learned: Mapping[str, npt.NDArray[Any]] | None = None) -> None:
        self._shape = shape
        n = shape.n_layer * shape.n_expert
        self._first = np.arange(shape.n_layer)[:, None] * shape.n_expert
        self._past = _Averages(1, n)
        self._state = np.zeros((len(HALF_LIVES), _WIDTH), np.float32)  # sums @ embed
        self._parameters, self._learned = _blank(n), False
        self._odds: Floats | None = None
        if learned is not None:
            self.load(learned)

    def begin_sequence(self) -> None:
        self._past.begin_text(np.array([0]))
        self._state[-_OF_TEXT:] = 0
        self._odds = None

    def observe(self, ids: npt.NDArray[np.uint16], weights: npt.NDArray[np.float32] | None) -> None:
        used = (self._first + ids).ravel()
        self._past.fade()
        self._past.sums[0][:, used] += _GAIN[:, None]
        if self._learned:
            self._state *= _KEEP[:, None]
            self._state += _GAIN[:, None] * self._parameters["embed"][used].sum(axis=0)
        self._odds = self._compute()

    def observe_prompt(self, pairs: npt.NDArray[np.int64]) -> None:
        """As if the prompt's tokens had been decoded, each with the average of them all."""
        self._past.absorb(pairs, self._shape.n_expert_used)
        self._project()

    def priorities(self) -> Floats:
        if self._odds is None:
            self._odds = self._compute()
        return self._odds.copy()

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
        self._take(arrays)

    def fit(self, trace: Trace, stop: Callable[[], bool] = lambda: False) -> bool:
        """Learn from a trace of the same model, going on from what is known. Other calls must wait meanwhile.

        The last tenth of the tokens judges: only what orders experts better for them than what was known is taken.
        Fewer than some ten thousand tokens teach nothing.

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
            self._take(found)
        return found is not None

    def _take(self, parameters: Parameters) -> None:
        """Use what was learned from now on."""
        self._parameters, self._learned = parameters, True
        self._project()

    def _project(self) -> None:
        self._state = self._past.sums[0] @ self._parameters["embed"]
        self._odds = None

    def _compute(self) -> Floats:
        known, past = self._parameters, self._past
        scale, where = past.scale()[0], past.where()[0]
        logs = past.sums[0] * scale[:, None]
        logs += _FLOOR
        np.log(logs, out=logs)
        odds: Floats = (where @ known["mix"]) @ logs
        if self._learned:
            odds += where @ known["bias"]
            inputs = np.concatenate([(self._state * scale[:, None]).ravel(), where])
            odds += np.tanh(inputs @ known["into"] + known["offset"]) @ known["out"]
        return odds.reshape(self._shape.n_layer, self._shape.n_expert)


class _Batch(NamedTuple):
    uses: Floats
    """float32 [n, h, x]: s after one token each"""
    where: Floats
    """float32 [n, len(_LENGTHS)]: p"""
    ahead: Floats
    """float32 [n, x]: the part of the time after the next token that uses each expert"""
    counts: Floats
    """float32 [n, x]: 1 where that is known and the next token leaves the expert alone, else 0"""


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
    begins = np.isin(tokens, starts)
    averages = _Averages(streams, n_layer * n_expert)
    for begin in range(-_WARM_UP, length, _BLOCK):
        n = min(_BLOCK, length - begin)
        at = (first + np.arange(begin, begin + n + 1 + _AHEAD)[:, None]) % n_token
        used = np.zeros((*at.shape, n_layer, n_expert), np.bool_)
        np.put_along_axis(used, ids[at].astype(np.int64), True, axis=3)
        used = used.reshape(*at.shape, -1)
        aheads = _aheads(used, n)
        for i in range(n):
            averages.begin_text(begins[at[i]])
            averages.fade()
            averages.sums += used[i][:, None] * _GAIN[:, None]
            if begin + i >= 0:
                known = (left[at[i + 1]] > _AHEAD)[:, None]
                uses = averages.sums * averages.scale()[:, :, None]
                yield _Batch(
                    uses, averages.where(), aheads[i].astype(np.float32), (known & ~used[i + 1]).astype(np.float32)
                )


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


def _shuffled(batches: Iterator[_Batch], random: np.random.Generator, n_batch: int) -> Iterator[_Batch]:
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
        yield _Batch(*(room[at] for room in shelf))
        for room, a in zip(shelf, batch, strict=True):
            room[at] = a
    rest = random.permutation(filled * n)
    for i in range(filled):
        yield _Batch(*(room[rest[i * n : (i + 1) * n]] for room in shelf))


class _Forward(NamedTuple):
    odds: Floats
    logs: Floats
    inputs: Floats
    units: Floats


def _forward(known: Parameters, batch: _Batch, kept: Floats | None = None, alive: Floats | None = None) -> _Forward:
    """The log odds [n, x] of a batch, and what their gradients need."""
    n = len(batch.uses)
    logs = batch.uses + _FLOOR
    np.log(logs, out=logs)
    odds = batch.where @ known["bias"] + np.matmul((batch.where @ known["mix"])[:, None], logs)[:, 0]
    embed = known["embed"] if kept is None else known["embed"] * kept[:, None]
    inputs = np.concatenate([(batch.uses.reshape(-1, len(embed)) @ embed).reshape(n, -1), batch.where], axis=1)
    units = np.tanh(inputs @ known["into"] + known["offset"])
    odds += (units if alive is None else units * alive) @ known["out"]
    return _Forward(odds, logs, inputs, units)


def _lost(known: Parameters, batches: Iterator[_Batch], n_expert: int) -> float:
    """Of the coming uses, the share by experts in the lower half of their layer: what half the slots would miss. Only
    the order counts, since what is not learned yet gives no true odds."""
    lost = uses = 0.0
    for batch in batches:
        odds = _forward(known, batch).odds.reshape(len(batch.uses), -1, n_expert)
        coming = (batch.counts * batch.ahead).reshape(odds.shape)
        lost += float(np.sum(coming, where=odds < np.median(odds, axis=2, keepdims=True), dtype=np.float64))
        uses += float(np.sum(coming, dtype=np.float64))
    return lost / uses if uses else 0.0


def _gradients(known: Parameters, batch: _Batch, random: np.random.Generator) -> Parameters:
    """Of the logistic loss, a token's experts summed up, tokens averaged."""
    n, n_in = len(batch.uses), len(HALF_LIVES) * _WIDTH
    spared = np.float32(1 / (1 - _DROPPED))
    kept = spared * (random.random(batch.uses.shape[2:], np.float32) >= _DROPPED)
    alive = spared * (random.random((n, len(known["offset"])), np.float32) >= _DROPPED)
    odds, logs, inputs, units = _forward(known, batch, kept, alive)
    error = batch.counts * (1 / (1 + np.exp(-odds)) - batch.ahead) / np.float32(n)
    back = (error @ known["out"].T) * alive * (1 - units * units)
    towards = (back @ known["into"][:n_in].T).reshape(-1, _WIDTH)
    return {
        "bias": batch.where.T @ error,
        "mix": batch.where.T @ np.matmul(logs, error[:, :, None])[:, :, 0],
        "embed": (batch.uses.reshape(len(towards), -1).T @ towards) * kept[:, None],
        "into": inputs.T @ back,
        "offset": back.sum(axis=0),
        "out": (units * alive).T @ error,
    }


def _learn(known: Parameters, trace: Trace, stop: Callable[[], bool]) -> Parameters | None:
    """Better parameters than `known`, or None. The trace's last tokens decide which are better."""
    n_expert = trace.model.n_expert
    n_judge = int(len(trace.ids) * _JUDGES)
    if len(trace.ids) < _FEWEST:
        return None
    n = len(trace.ids) - n_judge
    judges = trace.ids[n:], trace.starts[trace.starts >= n] - n
    ids, starts = trace.ids[:n], trace.starts[trace.starts < n]
    best, least = None, _lost(known, _batches(*judges, n_expert, 0), n_expert)
    now = {name: a.copy() for name, a in known.items()}
    if not now["bias"].any():
        share = np.concatenate([np.bincount(layer.ravel(), minlength=n_expert) for layer in ids.swapaxes(0, 1)]) / n
        now["bias"][-1] = 0.3 * (np.log(share + 1e-3) - np.log(1 - share + 1e-3))
    adam, random = _Adam(now), np.random.default_rng(0)
    width = now["bias"].shape[1]
    streams = max(1, min(_STREAMS, n // _LEAST, _CELLS // width))
    length = n // streams
    waiting = max(1, min(length // 2, _WAITING // (streams * width)))
    passes = int(np.clip(_STEPS / length, *_PASSES))
    for p in range(passes):
        walk = _batches(ids, starts, n_expert, int(random.integers(n)))
        for i, batch in enumerate(_shuffled(walk, random, waiting)):
            if stop():
                return best
            done = (p + i / length) / passes
            rate = _RATE * 0.5 * (1 + np.cos(np.pi * done)) * min(1.0, (p * length + i + 1) / _SLOW_START)
            adam.step(_gradients(now, batch, random), rate)
        lost = _lost(now, _batches(*judges, n_expert, 0), n_expert)
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
