"""Whether looking ahead pays here: tried now and then, by the clock.

Reading ahead takes processor time and bandwidth from what is needed now, and guessing takes some of it from the
computing thread. Whether the sum is a gain depends on the model, the disk and what else runs, so it is measured: some
steps with, some without, in turns, and the medians are compared.

A step is a token computed alone, or one of each of several texts. Only steps of like size are compared, and what holds
for one size need not hold for another.
"""

from __future__ import annotations

import statistics

from pyengine.native import NativeEngine
from pyengine.traces.routing_log import Prompt, RoutingLog, Token

#: Steps before the first trial: the slots fill. A few do where each takes more than so many seconds: experts that take
#: so long are few, and every step the wrong way is dear.
_FIRST, _FEW, _SLOW = 48, 8, 0.2
#: Turns of a trial (with looking ahead, without, ...) and steps of a turn; the first of a turn does not count.
_TURNS = (True, False, False, True, False, True, True, False)
_STEPS = 4
#: Of two ways, the present one stays unless the other takes less than this share of its time.
_CLEARLY = 0.97
#: Steps until the next trial; as many times more after each trial that changes nothing.
_PAUSE, _LONGER, _LONGEST = 256, 4, 16384
#: Sizes are alike up to this ratio. So many steps of another size after each other: it is the size from now on.
_ALIKE, _CHANGED = 4 / 3, 16


class LookAheadTrial:
    """Listens to the steps' times and turns looking ahead off, or on again.

    Attributes:
        on: what holds between trials.
    """

    def __init__(self, native: NativeEngine, log: RoutingLog) -> None:
        self._native = native
        self.on = True
        self._size, self._strange = 0, 0  # of the steps that are compared; steps of another size since the last of them
        self._wait, self._pause = _FIRST, _PAUSE
        self._slow = _FIRST // _FEW  # as many steps a slow one counts for
        self._step = -1  # of the trial; below 0: none is going on
        self._seconds: dict[bool, list[float]] = {}
        log.listen(self)

    def token(self, token: Token) -> None:
        self._computed(1, token.seconds)

    def prompt(self, prompt: Prompt) -> None:
        if prompt.tokens == len(prompt.shares):
            self._computed(prompt.tokens, prompt.seconds)

    def _computed(self, size: int, seconds: float) -> None:
        """A step of so many tokens, each of another text."""
        self._size = self._size or size
        if max(size, self._size) > _ALIKE * min(size, self._size):
            self._strange += 1
            if self._strange == _CHANGED:
                self._begin_with(size)
            return
        self._strange = 0
        if self._step < 0:
            self._wait -= self._slow if seconds > _SLOW else 1
            if self._wait <= 0:
                self._step, self._seconds = 0, {True: [], False: []}
                self._native.set_look_ahead(_TURNS[0])
            return
        turn, place = divmod(self._step, _STEPS)
        if place:
            self._seconds[_TURNS[turn]].append(seconds)
        self._step += 1
        if self._step == len(_TURNS) * _STEPS:
            self._decide()
        elif place == _STEPS - 1:
            self._native.set_look_ahead(_TURNS[turn + 1])

    def _begin_with(self, size: int) -> None:
        """Steps of another size from now on: tried soon, and until then as it was."""
        self._size, self._strange = size, 0
        self._step, self._wait, self._pause = -1, 1, _PAUSE
        self._native.set_look_ahead(self.on)

    def _decide(self) -> None:
        present, other = (statistics.median(self._seconds[way]) for way in (self.on, not self.on))
        if other < _CLEARLY * present:
            self.on, self._pause = not self.on, _PAUSE
        else:
            self._pause = min(_LONGEST, _LONGER * self._pause)
        self._step, self._wait, self._slow = -1, self._pause, 1
        self._native.set_look_ahead(self.on)
