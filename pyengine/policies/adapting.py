"""How the learned policy goes on learning while it is used: every token shows which experts were wanted after those
before it, and the texts of one run have more in common with each other than with those learned from earlier.

Plain steps down the gradient of the same loss as in learning.py, a few tokens at a time; old tokens of the run are
shown again beside the new ones (experience replay, Lin 1992). Frequencies' weights and the experts' numbers stay.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float32]

#: How far ahead uses count: one n tokens ahead by this to the power n; and tokens that are looked at for it.
REACH, AHEAD = 0.85, 20
_WEIGHTS = (1 - REACH) * REACH ** np.arange(AHEAD)

#: New tokens of a step, and as many old ones. One at a time would read and write the matrices that much more often.
_STEP = 8
#: Old tokens that are kept, at most, and times experts.
_KEPT, _KEPT_CELLS = 4096, 4 << 20
#: Rates: of what is learned of each expert, of the units' weights, and of the units themselves, times experts, since
#: their gradient is a sum over all.
_BIAS_RATE, _OUT_RATE, _UNIT_RATE = np.float32(0.01), np.float32(3e-4), 0.23
#: In place of what is wanted: the next token uses the expert anyway, nobody could have evicted it.
_USED = -1.0


class Seen(NamedTuple):
    """What the odds after a token were computed from."""

    used: npt.NDArray[np.int64]
    """int64 [m]: the token's experts, counted through all layers"""
    own: Floats
    """float32 [x]: what the experts' own frequencies say"""
    inputs: Floats
    """float32 [n_in]: of the units; the position in the text, `where`, is the end of it"""


class Adaptation:
    """
    Args:
        parameters: of LearnedPolicy, changed in place; n_where: the length of `where`.
    """

    def __init__(self, parameters: dict[str, Floats], n_where: int) -> None:
        self._known, self._n_where = parameters, n_where
        n_in, n = len(parameters["into"]), parameters["out"].shape[1]
        self._latest: deque[Seen] = deque(maxlen=AHEAD + 2)
        n_kept = max(_STEP, min(_KEPT, _KEPT_CELLS // n))
        # Half the memory: their rounding is far below the noise of what they teach.
        self._own = np.zeros((n_kept, n), np.float16)
        self._ahead = np.zeros((n_kept, n), np.float16)
        self._inputs = np.zeros((n_kept, n_in), np.float16)
        self._n_seen = 0
        self._unit_rate = np.float32(_UNIT_RATE / n)
        # Fresh memory for each product of the size of a matrix would take longer than the product.
        self._room = {name: np.empty_like(parameters[name]) for name in ("bias", "into", "out")}
        self._random = np.random.default_rng(0)

    def interrupt(self) -> None:
        """The next token is not what comes after the last one."""
        self._latest.clear()

    def token(self, seen: Seen) -> None:
        """Another token of the text."""
        self._latest.append(seen)
        if len(self._latest) < AHEAD + 2:
            return
        past, following, *later = self._latest
        place = self._n_seen % len(self._own)
        experts = np.concatenate([token.used for token in later])
        ahead = np.bincount(experts, np.repeat(_WEIGHTS, len(seen.used)), minlength=len(past.own))
        ahead[following.used] = _USED
        self._own[place], self._inputs[place], self._ahead[place] = past.own, past.inputs, ahead
        self._n_seen += 1
        if self._n_seen % _STEP == 0:
            new = np.arange(self._n_seen - _STEP, self._n_seen) % len(self._own)
            old = self._random.integers(min(self._n_seen, len(self._own)), size=_STEP)
            self._learn(np.concatenate([new, old]))

    def _learn(self, places: npt.NDArray[np.int64]) -> None:
        known = self._known
        own, inputs, ahead = (kept[places].astype(np.float32) for kept in (self._own, self._inputs, self._ahead))
        where = inputs[:, -self._n_where :]
        units = np.tanh(inputs @ known["into"] + known["offset"])
        odds = own + where @ known["bias"] + units @ known["out"]
        # The logistic function, which as a tanh cannot overflow.
        error = np.where(ahead == _USED, np.float32(0), np.float32(0.5) + np.float32(0.5) * np.tanh(odds / 2) - ahead)
        back = (error @ known["out"].T) * (1 - units * units)
        self._descend("bias", _BIAS_RATE, where, error)
        self._descend("out", _OUT_RATE, units, error)
        self._descend("into", self._unit_rate, inputs, back)
        known["offset"] -= self._unit_rate * back.sum(axis=0)

    def _descend(self, name: str, rate: np.float32, inputs: Floats, errors: Floats) -> None:
        matrix = self._known[name]
        change = np.matmul(inputs.T * -rate, errors, out=self._room[name])
        np.add(matrix, change, out=matrix)
