"""Which experts the layers of a step need when several texts are computed together, and how many of them are missing.

Pure. Every text is a stretch of the routing: a trace's tokens in a row, so that what a text uses again it uses again
here. n texts at n places of it make a step of n tokens; a chunk of a prompt is one more stretch, of as many tokens. The
engine's rules (pyengine.replay) then tell who is missing. For balanced routing a layer needs E(1 - (1 - k/E)^n) experts
in the mean, of which only those that are not resident must come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pyengine.planning.routing import Routing
from pyengine.policies import DEFAULT_POLICY, as_one_text, make_policy
from pyengine.replay.layout import Layout
from pyengine.replay.slots import ReplayedSlots

Floats = npt.NDArray[np.float64]

#: Steps that are looked at, and as many as the slots get beforehand to hold what they will hold.
_STEPS, _WARM_UP = 16, 16
#: Fewer of both if they would take too long: accesses of experts that are replayed for one answer, and the least steps.
_ACCESSES, _LEAST = 16_000, 4


@dataclass(frozen=True)
class StepDemand:
    """What the layers of some steps need, float64 [n_sample] each; a sample is one layer of one step."""

    hot: Floats
    """distinct experts that are resident"""
    hot_rows: Floats
    """(token, expert) pairs on them"""
    cold: Floats
    """distinct experts that are missing"""
    cold_rows: Floats
    n_layer: int
    """a step has so many layers"""

    @property
    def missing(self) -> float:
        """Experts of a layer that are missing, mean."""
        return float(self.cold.mean())

    @property
    def wanted(self) -> float:
        """Experts that a layer needs, mean."""
        return float((self.hot + self.cold).mean())


class Demand:
    """
    Args:
        layers: the layers of each shape class, whose slots they share.
        policy: what the engine keeps; a name in pyengine.policies.POLICIES.
    """

    def __init__(self, routing: Routing, layers: Sequence[Sequence[int]], policy: str = DEFAULT_POLICY) -> None:
        self._ids = routing.ids.astype(np.int64)
        self._n_expert = routing.n_expert
        self._groups = tuple(tuple(members) for members in layers)
        self._policy = policy
        self._known: dict[tuple[int, int, tuple[int, ...]], StepDemand] = {}
        self.n_layer, self.n_used = int(self._ids.shape[1]), int(self._ids.shape[2])

    @property
    def n_experts_total(self) -> int:
        return self.n_layer * self._n_expert

    def of(self, sequences: int, chunk: int, slots: Sequence[int]) -> StepDemand:
        """Steps with a token of each of so many texts and `chunk` tokens of a prompt, with so many slots of each class,
        once these have filled."""
        key = (sequences, chunk, tuple(slots))
        if key not in self._known:
            self._known[key] = self._look(*key)
        return self._known[key]

    def _look(self, sequences: int, chunk: int, slots: tuple[int, ...]) -> StepDemand:
        tokens = sequences + chunk
        each = self.n_layer * min(self._n_expert, tokens * self.n_used)
        n = max(_LEAST, min(_STEPS, _ACCESSES // (2 * each)))
        all_here = all(s >= len(g) * self._n_expert for s, g in zip(slots, self._groups, strict=True))
        warm = 0 if all_here else max(_LEAST, min(_WARM_UP, n))
        pairs = self._pairs(sequences, chunk, warm + n)
        shares = (1,) * sequences + (chunk,) * (chunk > 0)
        here = np.ones((n, *pairs.shape[1:]), np.bool_) if all_here else self._resident(pairs, warm, slots, shares)
        pairs = pairs[warm:]
        wanted, cold = pairs > 0, (pairs > 0) & ~here
        return StepDemand(
            hot=(wanted & here).sum(axis=2).reshape(-1).astype(np.float64),
            hot_rows=(pairs * here).sum(axis=2).reshape(-1).astype(np.float64),
            cold=cold.sum(axis=2).reshape(-1).astype(np.float64),
            cold_rows=(pairs * cold).sum(axis=2).reshape(-1).astype(np.float64),
            n_layer=self.n_layer,
        )

    def _pairs(self, sequences: int, chunk: int, n_step: int) -> npt.NDArray[np.int64]:
        """int64 [n_step, n_layer, n_expert]: tokens of each step that chose each expert."""
        random = np.random.default_rng(0)
        have = len(self._ids)
        # Apart from each other as far as the trace is long, and by chance: texts have nothing to do with each other.
        begins = (random.permutation(sequences) * have // max(1, sequences) + random.integers(have)) % have
        prompts = random.integers(have, size=n_step)
        rows = np.arange(self.n_layer)[:, None]
        out = np.zeros((n_step, self.n_layer, self._n_expert), np.int64)
        for step in range(n_step):
            tokens = np.concatenate([(begins + step) % have, (prompts[step] + np.arange(chunk)) % have])
            np.add.at(out[step], (rows, self._ids[tokens].transpose(1, 0, 2).reshape(self.n_layer, -1)), 1)
        return out

    def _resident(
        self, pairs: npt.NDArray[np.int64], warm: int, slots: tuple[int, ...], shares: tuple[int, ...]
    ) -> npt.NDArray[np.bool_]:
        """bool [n_step - warm, n_layer, n_expert]: who lies in a slot when its layer's turn comes."""
        layout = Layout(self.n_layer, self._n_expert, self.n_used, self._groups, slots)
        store, policy = ReplayedSlots(layout), make_policy(self._policy, layout.cache_shape)
        here = np.zeros((len(pairs) - warm, *pairs.shape[1:]), np.bool_)
        self._fill(store, pairs)
        for step, of_step in enumerate(pairs):
            for layer, of_layer in enumerate(of_step):
                experts = np.flatnonzero(of_layer)
                place = store.place[layer]
                if step >= warm:
                    now = np.frombuffer(store.here, np.bool_)[place : place + self._n_expert]
                    here[step - warm, layer] = now
                    del now  # the store's bytes must not be held
                store.use_by_many(layer, (experts + place).tolist(), of_layer[experts].tolist())
            policy.observe_prompt(as_one_text(of_step, self.n_used, shares))  # as Keeper tells it
            store.set_priorities(policy.priorities())
        return here

    def _fill(self, store: ReplayedSlots, pairs: npt.NDArray[np.int64]) -> None:
        """No slot is empty at the beginning: what is used most lies there, as after a while of running."""
        use = pairs.sum(axis=0)
        for group, members in enumerate(self._groups):
            mine = use[list(members)]
            for flat in np.argsort(-mine, axis=None, kind="stable")[: store.slots[group]].tolist():
                layer, expert = members[flat // self._n_expert], flat % self._n_expert
                number = store.place[layer] + expert
                store.claim(number, group)
                store.unpin(number, store.tick())


def expected_distinct(n_expert: int, n_used: int, tokens: float) -> float:
    """Experts that so many tokens use in a layer if all are equally likely and tokens do not care for each other."""
    return n_expert * (1.0 - float((1.0 - n_used / n_expert) ** tokens))
