"""How the learned policy goes on learning while it is used: every token shows which experts were wanted after those
before it, and the texts of one run have more in common with each other than with those learned from earlier.

Plain steps down the gradient of the same loss as in learning.py, a few tokens at a time. Frequencies' weights and the
experts' numbers stay. The steps are small: three times larger ones did harm. With small ones it gained nothing to show
old tokens of the run again beside the new ones (experience replay, Lin 1992), at twice the cost.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float32]

#: How far ahead uses count: one n tokens ahead by this to the power n; and tokens that are looked at for it. Parts of
#: the gap between LRU and Belady closed with 8, 12 and 16 slots of 32, on sequences 122 to 169 of gpt-oss-20b after
#: learning from those before: 0.65: 0.541, 0.538, 0.518; 0.7: 0.537, 0.538, 0.521; 0.75: 0.527, 0.536, 0.521; 0.85,
#: with twice the steps: 0.492, 0.513, 0.512. It is the uses just ahead that are known, and that decide.
REACH, AHEAD = 0.7, 14
_WEIGHTS = (1 - REACH) * REACH ** np.arange(AHEAD)

#: Tokens of a step. One at a time would read and write the matrices that much more often.
_STEP = 16
#: Rates: of what is learned of each expert, of the units' weights, and of the units themselves, times experts, since
#: their gradient is a sum over all.
_BIAS_RATE, _OUT_RATE, _UNIT_RATE = np.float32(0.003), np.float32(1e-4), 0.077
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
        self._own, self._ahead = (np.zeros((_STEP, n), np.float32) for _ in range(2))
        self._inputs = np.zeros((_STEP, n_in), np.float32)
        self._n_waiting = 0
        self._unit_rate = np.float32(_UNIT_RATE / n)
        # Fresh memory for each product of the size of a matrix would take longer than the product.
        self._room = {name: np.empty_like(parameters[name]) for name in ("bias", "into", "out")}

    def interrupt(self) -> None:
        """The next token is not what comes after the last one."""
        self._latest.clear()

    def token(self, seen: Seen) -> None:
        """Another token of the text."""
        self._latest.append(seen)
        if len(self._latest) < AHEAD + 2:
            return
        past, following, *later = self._latest
        experts = np.concatenate([token.used for token in later])
        ahead = np.bincount(experts, np.repeat(_WEIGHTS, len(seen.used)), minlength=len(past.own))
        ahead[following.used] = _USED
        i = self._n_waiting
        self._own[i], self._inputs[i], self._ahead[i] = past.own, past.inputs, ahead
        self._n_waiting = (i + 1) % _STEP
        if self._n_waiting == 0:
            self._learn()

    def _learn(self) -> None:
        known, own, inputs, ahead = self._known, self._own, self._inputs, self._ahead
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
