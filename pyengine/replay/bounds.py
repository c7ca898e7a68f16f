"""What no online policy can do, because it knows what comes: bounds for the others. They exist in replay only.

Belady evicts the expert whose next use is farthest away (Belady 1966). SCH(m) (arXiv 2505.16056) evicts on a miss the
one that is used least in the next m tokens.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pyengine.replay.hits import Misses, Replay
from pyengine.replay.layout import Layout
from pyengine.replay.slots import ReplayedSlots
from pyengine.replay.steps import PromptStep, Steps

#: The `m` of SCH(m): tokens that it looks ahead.
SEGMENT = 16

_NEVER_AGAIN = (1 << 31) - 1


def next_uses(steps: Steps) -> tuple[npt.NDArray[np.int64], list[npt.NDArray[np.int64]]]:
    """When each expert is used again after a step, counted in steps of one layer; _NEVER_AGAIN if it is not.

    Returns:
        int64 [n_token, n_layer, n_expert_used], for the ids in ascending order; and for each prompt of steps.prompts
        int64 [n_layer, n_expert].
    """
    n_layer = steps.n_layer
    ids = np.sort(steps.ids, axis=2).astype(np.int64)
    out = np.empty(ids.shape, np.int64)
    of_prompts = []
    upcoming = np.full((n_layer, steps.n_expert), _NEVER_AGAIN, np.int64)
    rows = np.arange(n_layer)[:, None]
    prompts = list(steps.prompts)
    step = len(prompts) + steps.n_token
    for token in range(steps.n_token, -1, -1):
        if token < steps.n_token:
            step -= 1
            out[token] = upcoming[rows, ids[token]]
            upcoming[rows, ids[token]] = step * n_layer + rows
        while prompts and prompts[-1][0] == token:
            step -= 1
            of_prompts.append(upcoming.copy())
            for layer, experts in enumerate(prompts.pop()[1].experts):
                upcoming[layer, experts] = step * n_layer + layer
    return out, of_prompts[::-1]


class _Belady(Replay):
    """Priority of an expert: the sooner its next use, the higher, set when it is used."""

    def __init__(self, steps: Steps, layout: Layout) -> None:
        super().__init__(steps, layout, None, self._announce)
        self._after, prompts = next_uses(steps)
        self._after_prompts = iter(prompts)
        places = np.array(self.slots.place)[:, None]
        self._numbers = np.sort(steps.ids, axis=2) + places
        self._places = places

    def _announce(self, slots: ReplayedSlots, token: int) -> None:
        slots.set_next_uses(self._numbers[token].ravel(), _NEVER_AGAIN - self._after[token].ravel())

    def _prompt(self, prompt: PromptStep) -> None:
        after = next(self._after_prompts)
        numbers = self._places + np.arange(self._steps.n_expert)
        used = prompt.dense(self._steps.n_expert) > 0
        self.slots.set_next_uses(numbers[used], _NEVER_AGAIN - after[used])
        super()._prompt(prompt)


def belady(steps: Steps, layout: Layout) -> Misses:
    """The fewest misses that any choice of victims can have."""
    return _Belady(steps, layout).run()


def sch(steps: Steps, layout: Layout, segment: int = SEGMENT) -> Misses:
    """SCH(segment, rho), where rho * n_expert_used is the number of slots per layer."""
    counts = np.zeros((steps.n_layer, steps.n_expert), np.float32)
    rows = np.arange(steps.n_layer)[:, None]
    for token in range(min(segment, steps.n_token)):
        counts[rows, steps.ids[token]] += 1

    def before_token(slots: ReplayedSlots, token: int) -> None:
        counts[rows, steps.ids[token]] -= 1
        if token + segment < steps.n_token:
            counts[rows, steps.ids[token + segment]] += 1
        slots.set_priorities(counts)

    return Replay(steps, layout, None, before_token).run()
