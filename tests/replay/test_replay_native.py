"""The native engine and the replay, with the same ids and the same policy, hit, miss and evict the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from pyengine import Llama, bundled_model
from pyengine.native import ModelInfo, NativeEngine
from pyengine.policies import Policy, make_policy
from pyengine.replay.layout import shared_slots
from pyengine.replay.slots import ReplayedSlots

HIT, MISS, EVICT = 0, 1, 2
Event = tuple[int, int, int]  # layer, expert, kind


def routing(n_token: int, n_layer: int, n_expert: int, n_used: int) -> NDArray[np.uint16]:
    """uint16 [n_token, n_layer, n_used]: skewed, and each token like the one before in part."""
    chance = np.random.default_rng(11)
    favour = np.linspace(0, 0.5, n_expert)
    scores = chance.random((n_layer, n_expert))
    ids = np.zeros((n_token, n_layer, n_used), np.uint16)
    for token in range(n_token):
        scores = 0.5 * scores + 0.5 * (chance.random((n_layer, n_expert)) + favour)
        ids[token] = np.argsort(-scores, axis=1)[:, :n_used]
    return ids


def info() -> ModelInfo:
    engine = NativeEngine(bundled_model())
    try:
        return engine.info
    finally:
        engine.close()


class Driven:
    """The bundled model at one budget computes chunks of tokens with given routing; a policy advises after each.

    Args:
        chunks: tokens of each computation.
    """

    def __init__(self, budget: str | int, policy_name: str, chunks: Sequence[int] = (1,) * 24) -> None:
        llm = Llama(ram_budget=budget, policy="lru", look_ahead="off", n_ctx=256, n_threads=1, n_threads_batch=1)
        assert llm.engine is not None
        try:
            native, model = llm.engine.native, llm.engine.info
            self.chunks = chunks
            self.slots = int(llm.expert_stats()["slots"])
            self.ids = routing(sum(chunks), model.n_layer, model.n_expert, model.n_expert_used)
            self.layout = shared_slots(model.n_layer, model.n_expert, model.n_expert_used, self.slots)
            native.set_replay(self.ids.astype(np.int32))
            policy = make_policy(policy_name, self.layout.cache_shape)
            native.events()
            self.events: list[Event] = []
            for step in self.steps():
                llm.eval([1] * step.n_token)
                taken = native.events()
                self.events += [
                    (int(e["layer"]), int(e["expert"]), int(e["kind"])) for e in taken if e["kind"] <= EVICT
                ]
                step.tell(policy)
                native.set_priorities(policy.priorities())
        finally:
            llm.close()

    def steps(self) -> Iterator[Step]:
        n_layer = self.layout.n_layer
        at = [0] * n_layer
        for n in self.chunks:
            # llama.cpp computes the last layer's experts only for the token whose output it wants.
            rows = [n] * (n_layer - 1) + [1]
            yield Step(n, [self.ids[at[layer] : at[layer] + rows[layer], layer] for layer in range(n_layer)])
            at = [a + r for a, r in zip(at, rows, strict=True)]

    def replayed(self, policy_name: str) -> list[Event]:
        slots, n_expert = ReplayedSlots(self.layout), self.layout.n_expert
        policy = make_policy(policy_name, self.layout.cache_shape)
        events: list[Event] = []
        for step in self.steps():
            for layer, ids in enumerate(step.ids):
                experts, pairs = np.unique(ids, return_counts=True)
                wanted = (experts.astype(int) + layer * n_expert).tolist()
                events += [(layer, e % n_expert, HIT if slots.here[e] else MISS) for e in wanted]
                slots.evicted = []
                slots.use_by_many(layer, wanted, pairs.tolist())
                events += [(*divmod(e, n_expert), EVICT) for e in slots.evicted]
            step.tell(policy)
            slots.set_priorities(policy.priorities())
        return events


class Step(NamedTuple):
    n_token: int
    ids: list[NDArray[np.uint16]]
    """by layer, [rows, n_used]"""

    def tell(self, policy: Policy) -> None:
        if self.n_token == 1:
            policy.observe(np.concatenate(self.ids), None)
            return
        policy.observe_prompt(np.stack([np.bincount(ids.ravel(), minlength=32) for ids in self.ids]))


@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize("budget", ["12.5%", "25%", "50%"])
def test_the_engine_does_what_the_replay_says(budget: str, policy: str) -> None:
    """240 experts serve one token: 25 %."""
    driven = Driven(budget, policy)
    assert driven.events == driven.replayed(policy)
    kinds = {kind for _, _, kind in driven.events}
    assert MISS in kinds and (EVICT in kinds or budget == "75%") and (HIT in kinds or budget in ("12.5%", "25%"))


@pytest.mark.parametrize("policy", ["lru", "arc", "mrs"])
def test_prompts_too_are_as_the_replay_says(policy: str) -> None:
    driven = Driven("60%", policy, chunks=[5, 1, 1, 1, 20, 1, 1, 3, 1, 1])
    assert driven.events == driven.replayed(policy)
    assert {kind for _, _, kind in driven.events} == {HIT, MISS, EVICT}


def test_with_one_slot_everything_is_loaded_one_after_the_other() -> None:
    driven = Driven(info().least_budget, "lru")
    assert driven.slots == 1
    assert driven.events == driven.replayed("lru")


def test_with_fewer_slots_than_one_layer_needs_hits_and_misses_are_the_same() -> None:
    """Which of a layer's loads lands first, and so makes room first, is the disk's affair."""
    driven = Driven(5 * info().slot_bytes // info().n_experts_total, "lfu")
    assert 1 < driven.slots < driven.ids.shape[2]
    wanted = [e for e in driven.replayed("lfu") if e[2] != EVICT]
    assert [e for e in driven.events if e[2] != EVICT] == wanted
