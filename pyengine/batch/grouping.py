"""In which order the lines of a batch are computed, and how many at once."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pyengine.errors import UsageError
from pyengine.sessions import Request

#: Lines that are in memory and sorted together.
WINDOW = 256

#: Most lines at once that "auto" chooses.
MOST_AT_ONCE = 32

#: Tokens that an answer without a limit is taken to have, to tell how many fit the context at once. If they get longer,
#: the scheduler sees to it.
_USUAL_ANSWER = 256


@dataclass(frozen=True)
class Prompt:
    """A line ready to be computed."""

    number: int
    key: str
    custom_id: str
    is_chat: bool
    request: Request

    @property
    def cells(self) -> int:
        """KV cells that it is likely to need: prompt and answer."""
        limit = self.request.sampling.max_tokens
        return len(self.request.tokens) + (_USUAL_ANSWER if limit is None else limit)


class Window:
    """Takes prompts as they come, WINDOW of them at a time, and gives them out with those together that begin alike:
    the scheduler then computes a common beginning once, while it is still in the KV cache. A pipe is waited for."""

    def __init__(self, prompts: Iterable[Prompt], size: int = WINDOW) -> None:
        if size < 1:
            raise UsageError(f"window must be at least 1, and is {size}")
        self._source = iter(prompts)
        self._size = size
        self._next: list[Prompt] = []
        self._sorted: deque[Prompt] = deque()
        self.exhausted = False

    def look(self) -> Sequence[Prompt]:
        """What comes next, in order; fills the window if it is empty."""
        if not self._sorted:
            self.prepare(self._size)
            # Sorted by token ids, prompts that begin alike are neighbours.
            self._sorted.extend(sorted(self._next, key=lambda prompt: (prompt.request.tokens, prompt.number)))
            self._next.clear()
        return self._sorted

    def prepare(self, count: int) -> None:
        """Take up to `count` prompts for the window after this one, so that it does not come as one long pause."""
        while not self.exhausted and count > 0 and len(self._next) < self._size:
            prompt = next(self._source, None)
            if prompt is None:
                self.exhausted = True
            else:
                self._next.append(prompt)
            count -= 1

    def take(self) -> Prompt:
        """The first of what look() shows."""
        return self._sorted.popleft()


def choose_parallel(asked: int | None, n_sequences: int, n_cells: int, prompts: Sequence[Prompt]) -> int:
    """How many lines to compute at once.

    With offloaded experts more at once is better, up to where loading is hidden: each expert that was loaded serves all
    of them. This takes as many as the KV cells hold, of which the planner may choose fewer: see course.py.

    Args:
        asked: what the user wants; None: choose.
        n_sequences: sequences of the model's context; every second one is left to prefixes that are kept.
        n_cells: KV cells of the model's context.
        prompts: the first lines, as a sample; all of them if they are fewer than a window.

    Raises:
        UsageError: the model was opened for fewer sequences than asked for.
    """
    if asked is not None:
        if asked < 1:
            raise UsageError(f"parallel must be at least 1, and is {asked}")
        if asked > n_sequences:
            raise UsageError(f"{asked} lines at once need a model opened with n_sequences={asked} or more")
        return asked
    if not prompts:
        return 1
    usual = statistics.median(prompt.cells for prompt in prompts)
    return max(1, min(MOST_AT_ONCE, n_sequences // 2, int(n_cells // usual), len(prompts)))
