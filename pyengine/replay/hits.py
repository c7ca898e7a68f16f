"""Hits and misses of a cache policy over a trace; no time, nothing is prefetched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pyengine.policies import Policy
from pyengine.replay.layout import Layout
from pyengine.replay.slots import ReplayedSlots
from pyengine.replay.steps import PromptStep, Steps


@dataclass(frozen=True)
class Misses:
    """int64 [n_layer] each: distinct experts that decoded tokens, and prompts, needed, and how many were missing."""

    wanted: npt.NDArray[np.int64]
    missing: npt.NDArray[np.int64]
    prompt_wanted: npt.NDArray[np.int64]
    prompt_missing: npt.NDArray[np.int64]

    @property
    def hit_rate(self) -> float:
        """Of decoded tokens; NaN without any."""
        n = int(self.wanted.sum())
        return 1 - int(self.missing.sum()) / n if n else float("nan")

    @property
    def by_layer(self) -> list[float]:
        """Hit rate of each layer."""
        rates: list[float] = (1 - self.missing / np.maximum(self.wanted, 1)).tolist()
        return rates


class Replay:
    """One policy over one trace.

    Args:
        policy: None for an oracle, which sets priorities itself.
        before_token: called with the token's number before it; for oracles.
    """

    def __init__(
        self,
        steps: Steps,
        layout: Layout,
        policy: Policy | None,
        before_token: Callable[[ReplayedSlots, int], None] | None = None,
    ) -> None:
        self.slots = ReplayedSlots(layout)
        self._steps = steps
        self._policy = policy
        self._before = before_token
        self._prompts = steps.prompts_at()
        n = steps.n_layer
        self._missing = [0] * n
        self._prompt_wanted, self._prompt_missing = [0] * n, [0] * n

    def run(self) -> Misses:
        steps, slots, missing = self._steps, self.slots, self._missing
        layers = range(steps.n_layer)
        for token, wanted in enumerate(steps.numbers(slots.place)):
            self._between(token)
            if self._before is not None:
                self._before(slots, token)
            for layer in layers:
                missing[layer] += slots.use(layer, wanted[layer])
            self._learn(token)
        self._between(steps.n_token)
        return self.misses()

    def misses(self) -> Misses:
        """What was counted so far."""
        steps = self._steps
        wanted = np.full(steps.n_layer, steps.n_token * steps.ids.shape[2], np.int64)
        counted = (self._missing, self._prompt_wanted, self._prompt_missing)
        return Misses(wanted, *(np.array(counts, np.int64) for counts in counted))

    def _between(self, token: int) -> None:
        """What happens before a token: a text begins, a prompt is computed."""
        if self._policy is not None and token in self._steps.starts:
            self._policy.begin_sequence()
        for prompt in self._prompts.get(token, ()):
            self._prompt(prompt)

    def _prompt(self, prompt: PromptStep) -> None:
        for layer, (experts, pairs) in enumerate(zip(prompt.experts, prompt.pairs, strict=True)):
            place = self.slots.place[layer]
            self._prompt_wanted[layer] += len(experts)
            self._prompt_missing[layer] += self.slots.use_by_many(layer, [place + e for e in experts], pairs)
        if self._policy is not None:
            self._policy.observe_prompt(prompt.dense(self._steps.n_expert))
            self.slots.set_priorities(self._policy.priorities())

    def _learn(self, token: int) -> None:
        if self._policy is not None:
            weights = self._steps.weights
            self._policy.observe(self._steps.ids[token], None if weights is None else weights[token])
            self.slots.set_priorities(self._policy.priorities())


def replay_policy(steps: Steps, layout: Layout, policy: Policy) -> Misses:
    """Misses of `policy` with the slots of `layout`, which are empty at first."""
    return Replay(steps, layout, policy).run()
