"""Whether looking ahead pays here: tried now and then, by the clock.

Reading ahead takes processor time and bandwidth from what is needed now, and guessing takes some of it from the
computing thread. Whether the sum is a gain depends on the model, the disk and what else runs, so it is measured: some
tokens with, some without, in turns, and the medians are compared.
"""

from __future__ import annotations

import statistics

from pyengine.native import NativeEngine
from pyengine.traces.routing_log import Prompt, RoutingLog, Token

#: Tokens before the first trial: the slots fill.
_FIRST = 48
#: Turns of a trial (with looking ahead, without, ...) and tokens of a turn; the first of a turn does not count.
_TURNS = (True, False, False, True, False, True, True, False)
_TOKENS = 4
#: Of two ways, the present one stays unless the other takes less than this share of its time.
_CLEARLY = 0.97
#: Tokens until the next trial; as many times more after each trial that changes nothing.
_PAUSE, _LONGER, _LONGEST = 256, 4, 16384


class LookAheadTrial:
    """Listens to the tokens' times and turns looking ahead off, or on again.

    Attributes:
        on: what holds between trials.
    """

    def __init__(self, native: NativeEngine, log: RoutingLog) -> None:
        self._native = native
        self.on = True
        self._wait, self._pause = _FIRST, _PAUSE
        self._step = -1  # of the trial; below 0: none is going on
        self._seconds: dict[bool, list[float]] = {}
        log.listen(self)

    def token(self, token: Token) -> None:
        if self._step < 0:
            self._wait -= 1
            if self._wait <= 0:
                self._step, self._seconds = 0, {True: [], False: []}
                self._native.set_look_ahead(_TURNS[0])
            return
        turn, place = divmod(self._step, _TOKENS)
        if place:
            self._seconds[_TURNS[turn]].append(token.seconds)
        self._step += 1
        if self._step == len(_TURNS) * _TOKENS:
            self._decide()
        elif place == _TOKENS - 1:
            self._native.set_look_ahead(_TURNS[turn + 1])

    def prompt(self, prompt: Prompt) -> None:
        pass

    def _decide(self) -> None:
        present, other = (statistics.median(self._seconds[way]) for way in (self.on, not self.on))
        if other < _CLEARLY * present:
            self.on, self._pause = not self.on, _PAUSE
        else:
            self._pause = min(_LONGEST, _LONGER * self._pause)
        self._step, self._wait = -1, self._pause
        self._native.set_look_ahead(self.on)
