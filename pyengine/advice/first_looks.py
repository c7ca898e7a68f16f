"""Which of the two plainest cache policies suits a model of which nothing is known: a few tokens replayed in place,
long before there are enough for a judgement (see choosing.py). On a slow disk they take minutes.

Which is better is a matter of the model, the text and the slots: where these hold just one token's experts and a text
repeats itself, recency misses a tenth less, with a tenth more slots it misses more. Both are simple enough that a few
tokens replay in milliseconds; where decoding is so fast that even this would be felt, the judgement comes soon enough.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from pyengine.advice.choosing import seconds_per_miss
from pyengine.advice.keeper import Keeper
from pyengine.native import ModelInfo, NativeEngine
from pyengine.policies import DEFAULT_POLICY
from pyengine.traces.routing_log import Prompt, Token

#: Tokens before the first look, for a text's beginning is unlike the rest; each later one is at twice as many.
_FIRST, _LAST = 64, 256
#: Of the time since the model began, what looks may take; and seconds that the first is taken to need.
_SHARE, _FIRST_SECONDS = 0.02, 0.05
_PLAIN = (DEFAULT_POLICY, "lru")


class FirstLooks:
    """Listens to a routing log, on the computing thread.

    Args:
        recent: the last tokens, uint16 [n, n_layer, n_expert_used].
        over: whether there was a judgement.
    """

    def __init__(
        self,
        native: NativeEngine,
        info: ModelInfo,
        keeper: Keeper,
        recent: Callable[[], npt.NDArray[np.uint16]],
        over: Callable[[], bool],
    ) -> None:
        self._native, self._info, self._keeper = native, info, keeper
        self._recent, self._over = recent, over
        self._tokens, self._seconds, self._spent = 0, 0.0, 0.0
        self._next, self._needed = _FIRST, _FIRST_SECONDS

    def token(self, token: Token) -> None:
        self._tokens += 1
        self._seconds += token.seconds
        if not self._next <= self._tokens <= 2 * _LAST or self._spent + self._needed > _SHARE * self._seconds:
            return
        if self._over():
            self._next = 2 * _LAST + 1
            return
        start = time.perf_counter()
        self._look()
        took = time.perf_counter() - start
        self._spent += took
        self._next, self._needed = 2 * self._tokens, 2 * took

    def prompt(self, prompt: Prompt) -> None:
        pass

    def _look(self) -> None:
        from pyengine.advice.judging import Question, choose, judge

        current, stats = self._keeper.policy, self._native.stats()
        recent = self._recent()[-self._tokens :]
        wait = seconds_per_miss(stats, self._info)
        question = Question(recent, self._info.n_expert, stats["slots"], current, wait)
        chosen = choose(current, judge(question, _PLAIN), wait)
        if chosen != current:
            self._keeper.switch(chosen, recent)
