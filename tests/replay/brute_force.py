"""A second opinion on the cache rules, written for clearness alone, and random traces to try it on."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pyengine.replay.layout import Layout
from pyengine.replay.steps import Steps, steps_of
from pyengine.traces import Prompts, Trace, TracedModel

Expert = tuple[int, int]  # layer, id


class Slots:
    """What the header and layer_step.cpp of the native engine say, one expert at a time."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.used: dict[Expert, int] = {}  # resident -> when it was last used
        self.pinned: set[Expert] = set()
        self.clock = 0
        self.priorities = np.zeros((layout.n_layer, layout.n_expert))
        self.evicted: list[Expert] = []

    def step(self, layer: int, pairs: dict[int, int]) -> int:
        """One layer with the experts of `pairs`, id -> tokens that chose it. Returns how many were missing."""
        group = next(i for i, layers in enumerate(self.layout.groups) if layer in layers)
        hits = [(layer, e) for e in sorted(pairs) if (layer, e) in self.used]
        missing = [(layer, e) for e in sorted(pairs, key=lambda e: (-pairs[e], e)) if (layer, e) not in self.used]
        for expert in hits:
            self.touch(expert)
        self.pinned = set(hits)
        waiting, loading = list(missing), []

        def begin() -> None:
            while waiting:
                mine = [r for r in self.used if r[0] in self.layout.groups[group]]
                if len(mine) >= self.layout.slots[group]:
                    free = [r for r in mine if r not in self.pinned]
                    if not free:
                        return
                    victim = min(free, key=lambda r: (self.worth(r), self.used[r]))
                    del self.used[victim]
                    self.evicted.append(victim)
                self.touch(waiting[0])
                self.pinned.add(waiting[0])
                loading.append(waiting.pop(0))

        begin()
        self.pinned -= set(hits)
        begin()
        while loading:
            self.pinned.remove(loading.pop(0))  # it landed and computed
            begin()
        assert not waiting
        return len(missing)

    def touch(self, expert: Expert) -> None:
        self.clock += 1
        self.used[expert] = self.clock

    def worth(self, expert: Expert) -> float:
        value = float(self.priorities[expert])
        return 0.0 if value != value else value


def misses(
    steps: Steps, layout: Layout, advise: Callable[[int], NDArray[np.float32]] | None = None
) -> tuple[list[int], list[Expert]]:
    """(misses of decoded tokens by layer, experts in the order in which they left); advise(token) gives the priorities
    that hold from after that token on."""
    slots, prompts = Slots(layout), steps.prompts_at()
    counts = [0] * steps.n_layer
    for token in range(steps.n_token + 1):
        for prompt in prompts.get(token, []):
            for layer in range(steps.n_layer):
                slots.step(layer, dict(zip(prompt.experts[layer], prompt.pairs[layer], strict=True)))
        if token < steps.n_token:
            for layer in range(steps.n_layer):
                counts[layer] += slots.step(layer, {int(e): 1 for e in steps.ids[token, layer]})
            if advise is not None:
                slots.priorities = advise(token)
    return counts, slots.evicted


def random_steps(
    seed: int, n_token: int = 60, n_layer: int = 3, n_expert: int = 8, n_used: int = 3, prompts: bool = True
) -> Steps:
    """Skewed routing, each token like the one before in part; prompts of 1 to n_expert experts per layer."""
    chance = np.random.default_rng(seed)
    ids = np.zeros((n_token, n_layer, n_used), np.uint16)
    scores = chance.random((n_layer, n_expert))
    for token in range(n_token):
        scores = 0.6 * scores + 0.4 * chance.random((n_layer, n_expert))
        ids[token] = np.argsort(-scores, axis=1)[:, :n_used]
    at = np.sort(chance.integers(0, n_token, 4)) if prompts else np.zeros(0, np.int64)
    experts, pairs, offsets = [], [], [0]
    for _ in range(len(at) * n_layer):
        members = np.flatnonzero(chance.random(n_expert) < chance.random())
        if not len(members):
            members = np.array([0])
        experts.append(members)
        pairs.append(chance.integers(1, 4, len(members)))
        offsets.append(offsets[-1] + len(members))
    assert all(a < b for a, b in pairwise(offsets))
    none = [np.zeros(0, np.int64)]
    trace = Trace(
        TracedModel("", "", n_layer, n_expert, n_used),
        ids=ids,
        starts=np.unique(np.append(at, 0)).astype(np.int64),
        prompts=Prompts(
            at=at.astype(np.int64),
            tokens=np.full(len(at), 5),
            offsets=np.array(offsets, np.int64),
            experts=np.concatenate(none + experts).astype(np.uint16),
            pairs=np.concatenate(none + pairs).astype(np.uint16),
        ),
    )
    return steps_of(trace)
