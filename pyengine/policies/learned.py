"""Learned odds: how probable it is that an expert is wanted again soon, learned from the routing of the same model.

Uses of every expert are averaged over several half-lives, over all tokens and over those of the present text:
s[h, x], where x counts the experts of all layers. The log odds that x is used a geometrically distributed time ahead:

    sum_h mix(p)[h] log(s[h, x] + FLOOR[h]) + bias(p)[x]                    its own frequency and recency
    + tanh([s @ embed, of every h; p] @ into + offset) @ out[x]             what else is in use: the subject, the token

p is the position in the text, since the past of the last text says little about this one; mix and bias are linear in
it. Being odds, the priorities compare across layers too. Only expert ids are needed. s @ embed is linear in s, so a
token costs a few rows of `embed` and the products of two vectors with small matrices. Before anything is learned only
the first sum counts, with one set of weights for all experts: frequencies of several half-lives. How the rest is
learned is in learning.py, and how that goes on while the policy is used in adapting.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pyengine.errors import PyengineError
from pyengine.policies.adapting import Adaptation, Floats, Seen
from pyengine.policies.policy import CacheShape, Policy

Parameters: TypeAlias = dict[str, Floats]

#: Tokens after which a use counts half; 0: only those of the latest token count. The last _OF_TEXT are of the present
#: text alone, and pulled towards zero as if it had begun with _UNKNOWN tokens that used nothing.
HALF_LIVES = (0, 2, 6, 20, 80, 300, 30, 300)
_OF_TEXT, _UNKNOWN = 2, 4
KEEP = np.array([0.5 ** (1 / h) if h else 0.0 for h in HALF_LIVES], np.float32)
GAIN = 1 - KEEP
FLOOR = np.array([[0.1 if h == 0 else 0.02] for h in HALF_LIVES], np.float32)
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


class LearnedPolicyError(PyengineError, ValueError):
    """What a policy learned belongs to another model, or is damaged; or a trace does, or is too short."""


def blank(n: int, seed: int = 0) -> Parameters:
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


class Averages:
    """s of several streams of tokens. `sums` is float32 [stream, h, x], `position` float32 [stream]."""

    def __init__(self, n_stream: int, n: int) -> None:
        self.sums = np.full((n_stream, len(HALF_LIVES), n), _TINY, np.float32)
        self.position = np.zeros(n_stream, np.float32)

    def begin_text(self, streams: npt.NDArray[Any]) -> None:
        """`streams`: bool [stream] or their numbers."""
        self.sums[streams, -_OF_TEXT:] = _TINY
        self.position[streams] = 0

    def fade(self) -> None:
        """Before a token's uses are added, each worth GAIN."""
        self.sums *= KEEP[:, None]
        np.maximum(self.sums, _TINY, out=self.sums)
        self.position += 1

    def absorb(self, pairs: npt.NDArray[np.int64], n_used: int) -> None:
        """To every stream a prompt: int64 [n_layer, n_expert], tokens that chose each expert."""
        chosen = pairs.sum(axis=1, keepdims=True)  # llama.cpp may have dropped tokens before the last layer
        share = (pairs * (n_used / np.maximum(chosen, 1))).astype(np.float32).ravel()
        tokens = np.repeat(chosen / n_used, pairs.shape[1]).astype(np.float32)
        kept = KEEP[:, None] ** tokens
        self.sums = np.maximum(self.sums * kept + share * (1 - kept), _TINY)
        self.position += tokens.max(initial=0)

    def scale(self) -> Floats:
        """What `sums` must be multiplied by to be averages: float32 [stream, h]."""
        out = np.ones((len(self.position), len(HALF_LIVES)), np.float32)
        keep = KEEP[-_OF_TEXT:]
        out[:, -_OF_TEXT:] = 1 / (1 - keep ** self.position[:, None] + _UNKNOWN * (1 - keep))
        return out

    def where(self) -> Floats:
        """p: float32 [stream, len(_LENGTHS)]."""
        out: Floats = np.exp(-self.position[:, None] / _LENGTHS)
        return out


def _fits(arrays: Parameters, n: int) -> bool:
    """Whether these are parameters, in their shapes, for n experts. How wide the matrices are, they say themselves."""
    n_half, n_length = len(HALF_LIVES), len(_LENGTHS)
    width, n_unit = (arrays[name].shape[-1:] if name in arrays else () for name in ("embed", "offset"))
    if not (width and n_unit):
        return False
    wanted = {
        "bias": (n_length, n),
        "mix": (n_length, n_half),
        "embed": (n, *width),
        "into": (n_half * width[0] + n_length, *n_unit),
        "offset": n_unit,
        "out": (*n_unit, n),
        "half_lives": (n_half,),
    }
    return {name: a.shape for name, a in arrays.items()} == wanted


class LearnedPolicy(Policy):
    """
    Args:
        learned: what save() gave.

    Attributes:
        parameters: known now; shape: of the cache.

    Raises:
        LearnedPolicyError: what was learned does not fit the shape.
    """

    def __init__(self, shape: CacheShape, learned: Mapping[str, npt.NDArray[Any]] | None = None) -> None:
        self.shape = shape
        n = shape.n_layer * shape.n_expert
        self._first = np.arange(shape.n_layer)[:, None] * shape.n_expert
        self._past = Averages(1, n)
        self.parameters = blank(n)
        self._adaptation: Adaptation | None = None  # nothing is learned yet
        self._state: Floats = self._past.sums[0] @ self.parameters["embed"]
        self._odds: Floats | None = None
        if learned is not None:
            self.load(learned)

    def begin_sequence(self) -> None:
        self._past.begin_text(np.array([0]))
        self._state[-_OF_TEXT:] = 0
        self._odds = None
        self._interrupt()

    def observe(self, ids: npt.NDArray[np.uint16], weights: npt.NDArray[np.float32] | None) -> None:
        used = (self._first + ids).ravel()
        self._past.fade()
        self._past.sums[0][:, used] += GAIN[:, None]
        if self._adaptation is not None:
            self._state *= KEEP[:, None]
            self._state += GAIN[:, None] * self.parameters["embed"][used].sum(axis=0)
        own, inputs = self._own(), self._inputs()
        self._odds = self._compute(own, inputs)
        if self._adaptation is not None:
            self._adaptation.token(Seen(used, own, inputs))

    def observe_prompt(self, pairs: npt.NDArray[np.int64]) -> None:
        """As if the prompt's tokens had been decoded, each with the average of them all."""
        self._past.absorb(pairs, self.shape.n_expert_used)
        self._project()
        self._interrupt()

    def priorities(self) -> Floats:
        if self._odds is None:
            self._odds = self._compute(self._own(), self._inputs())
        return self._odds.copy()

    def save(self) -> dict[str, npt.NDArray[Any]]:
        """What is known now, learned from a trace and since: float16 arrays by name, half_lives among them. Empty if
        nothing was learned."""
        if self._adaptation is None:
            return {}
        halves: dict[str, npt.NDArray[Any]] = {name: a.astype("<f2") for name, a in self.parameters.items()}
        return {**halves, "half_lives": np.array(HALF_LIVES, "<f2")}

    def load(self, learned: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go on from what save() gave. Raises LearnedPolicyError unless it fits; nothing is changed then."""
        if not learned:
            return
        arrays = {name: np.array(learned[name], np.float32) for name in learned}
        if not _fits(arrays, self.shape.n_layer * self.shape.n_expert):
            raise LearnedPolicyError("what the cache policy learned belongs to another model")
        if not all(np.isfinite(a).all() for a in arrays.values()):
            raise LearnedPolicyError("what the cache policy learned is damaged: not all of it are numbers")
        if not np.array_equal(arrays.pop("half_lives"), np.array(HALF_LIVES, np.float32)):
            raise LearnedPolicyError("what the cache policy learned is of another version")
        self.take(arrays)

    def take(self, parameters: Parameters) -> None:
        """Use what was learned from now on, and learn on: the arrays are this policy's from now on."""
        self.parameters = parameters
        self._adaptation = Adaptation(parameters, len(_LENGTHS))
        self._project()

    def _interrupt(self) -> None:
        if self._adaptation is not None:
            self._adaptation.interrupt()

    def _project(self) -> None:
        self._state = self._past.sums[0] @ self.parameters["embed"]
        self._odds = None

    def _own(self) -> Floats:
        """What the experts' own frequencies say: float32 [x]."""
        past = self._past
        logs = past.sums[0] * past.scale()[0][:, None]
        logs += FLOOR
        np.log(logs, out=logs)
        own: Floats = (past.where()[0] @ self.parameters["mix"]) @ logs
        return own

    def _inputs(self) -> Floats:
        """Of the units: float32 [n_in]."""
        past = self._past
        return np.concatenate([(self._state * past.scale()[0][:, None]).ravel(), past.where()[0]])

    def _compute(self, own: Floats, inputs: Floats) -> Floats:
        known, odds = self.parameters, own
        if self._adaptation is not None:
            units = np.tanh(inputs @ known["into"] + known["offset"])
            odds = own + inputs[-len(_LENGTHS) :] @ known["bias"] + units @ known["out"]
        return odds.reshape(self.shape.n_layer, self.shape.n_expert)
