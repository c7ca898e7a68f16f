"""Tells a running engine what to keep: a cache policy sees every token and gives each expert a priority."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from pyengine.native import ModelInfo, NativeEngine
from pyengine.policies import CacheShape, as_one_text, make_policy
from pyengine.traces.routing_log import Prompt, RoutingLog, Token

#: Recent tokens that a policy is shown when it takes over: further back the best of them hardly remember.
_SHOWN = 256
#: So few tokens together may be one each of several texts, if nobody says what they are: then no text begins.
_SEVERAL = 16
#: Tokens of a prompt as long as whose uses what is known of a model counts.
_PRIOR = 500


class Keeper:
    """
    Args:
        native: the engine; log: what its routers choose.
        policy: a name in pyengine.policies.POLICIES, or "learned".
        learned: the file of what was learned for this model, if there is one; see pyengine.policies.learned_for.
        instead_of_lru: the policy that takes over from "lru" once several texts are computed at once; None: none does.
            A step then uses so many experts, layer after layer, that the oldest are those that come next: with two
            texts LRU misses 1.1 to 1.5 times as many as LFU, with eight nearly all where half of the experts have slots
            (gpt-oss-20b, the bundled model).

    Attributes:
        policy: its name; learned: the file.

    Raises:
        UsageError: there is no such policy.
        OSError, LearnedPolicyError: the file can no longer be used.
    """

    def __init__(
        self,
        native: NativeEngine,
        info: ModelInfo,
        log: RoutingLog,
        policy: str,
        learned: Path | None = None,
        instead_of_lru: str | None = None,
    ) -> None:
        self._native = native
        self._log = log
        self.learned = learned
        self._instead_of_lru = instead_of_lru
        self._info = info
        self._shape = (info.n_layer, info.n_expert)
        self._make(policy)
        self._last: npt.NDArray[np.float32] | None = None
        log.listen(self)

    def token(self, token: Token) -> None:
        # An engine that does not see weights records zeros.
        weights = token.weights.astype(np.float32) if token.weights.any() else None
        self._policy.observe(token.ids, weights)
        if not self._log.more:
            self._advise()

    def prompt(self, prompt: Prompt) -> None:
        pairs = np.zeros(self._shape, np.int64)
        layers = np.repeat(np.arange(self._shape[0]), prompt.counts)
        pairs[layers, prompt.experts] = prompt.pairs
        if prompt.shares:
            if self.policy == "lru" and self._instead_of_lru is not None:
                self._make(self._instead_of_lru)
            self._policy.observe_prompt(as_one_text(pairs, self._info.n_expert_used, prompt.shares))
        else:
            if prompt.tokens > _SEVERAL:
                self._policy.begin_sequence()
            self._policy.observe_prompt(pairs)
        self._advise()

    def switch(self, policy: str, recent: npt.NDArray[np.uint16]) -> None:
        """Go on with another policy, which is shown the last tokens first: uint16 [n, n_layer, n_expert_used].

        Raises as the constructor does; then the policy before stays.
        """
        self._make(policy)
        self._show(recent)
        self._advise()

    def begin_warm(self, recent: npt.NDArray[np.uint16], uses: npt.NDArray[np.float32]) -> None:
        """Before the first token: show the policy what earlier runs have left, and let the engine read the experts that
        they used most, while nobody waits for anything.

        After the last text, whose end says little about the next, the policy sees the average of many as if it were a
        prompt: on gpt-oss-20b, for the first 50 tokens of a new text, better than either alone.

        Args:
            recent: uint16 [n, n_layer, n_expert_used], the last tokens.
            uses: float32 [n_layer, n_expert], shares of uses.
        """
        self._show(recent)
        self._policy.begin_sequence()
        self._policy.observe_prompt(np.rint(uses * (_PRIOR * self._info.n_expert_used)).astype(np.int64))
        self._advise()
        self._read(uses)

    def refill(self) -> None:
        """Let the engine read into slots that became free what would have the highest priorities there. From any
        thread."""
        last = self._last
        if last is not None:
            self._read(last - last.min())  # what is worth least is not worth reading; odds may all be negative

    def _make(self, policy: str) -> None:
        info, slots = self._info, self._native.stats()["slots"]
        shape = CacheShape(info.n_layer, info.n_expert, info.n_expert_used, slots)
        self._policy = make_policy(policy, shape, self.learned)
        self.policy = policy

    def _show(self, recent: npt.NDArray[np.uint16]) -> None:
        for ids in recent[-_SHOWN:]:
            self._policy.observe(ids, None)

    def _advise(self) -> None:
        priorities = self._policy.priorities()
        self._native.set_priorities(priorities)
        self._last = priorities

    def _read(self, worth: npt.NDArray[np.float32]) -> None:
        """The experts worth most, as many as there are slots: those without one that find an empty one."""
        n_layer, n_expert = self._shape
        order = np.argsort(-worth, axis=None, kind="stable")[: self._native.stats()["slots"]]
        order = order[worth.reshape(-1)[order] > 0]
        # Layer after layer, as a prompt will need them; in a layer the likeliest first.
        for layer in range(n_layer):
            experts = (order[order // n_expert == layer] % n_expert).tolist()
            if experts:
                self._native.expect(layer, experts, keep=True)
