"""Replayed hits, misses and evictions are those of the engine's rules; nothing beats Belady."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from brute_force import misses, random_steps

from pyengine.planning.routing import replay as lru_misses
from pyengine.policies import POLICIES, CacheShape, Policy, make_policy
from pyengine.replay.bounds import belady, next_uses, sch
from pyengine.replay.hits import Replay, replay_policy
from pyengine.replay.layout import Layout, own_slots, shared_slots
from pyengine.replay.slots import ReplayedSlots
from pyengine.replay.steps import Steps

#: Slots for all 3 layers of 8 experts, 3 of which a token uses: fewer than one layer's set, fewer than one token's,
#: more.
SHARED = [1, 2, 3, 5, 9, 12, 20, 24]
OWN = [1, 2, 3, 4, 6, 8]
LAYOUTS = [shared_slots(3, 8, 3, n) for n in SHARED] + [own_slots(3, 8, 3, n) for n in OWN]
#: As a model of two shapes of expert has it; layers out of order.
LAYOUTS.append(Layout(3, 8, 3, ((0, 2), (1,)), (7, 4)))


def name_of(layout: Layout) -> str:
    return f"{len(layout.groups)}x{layout.slots[0]}"


class Advice(Policy):
    """Priorities that were drawn before."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.token = values, -1

    def observe(self, ids: object, weights: object) -> None:
        self.token += 1

    def priorities(self) -> np.ndarray:
        return self.values[self.token] if self.token >= 0 else np.zeros(self.values.shape[1:], np.float32)


def advice(steps: Steps, kind: str) -> np.ndarray:
    shape = (steps.n_token, steps.n_layer, steps.n_expert)
    chance = np.random.default_rng(1)
    if kind == "zeros":
        return np.zeros(shape, np.float32)
    if kind == "noise":
        return chance.standard_normal(shape).astype(np.float32)
    special = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, 1e-40], np.float32)
    return chance.choice(special, shape)


@pytest.mark.parametrize("kind", ["zeros", "noise", "NaN, infinities and ties"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_misses_and_evictions_are_those_of_a_model_written_for_clearness(layout: Layout, seed: int, kind: str) -> None:
    steps = random_steps(seed)
    values = advice(steps, kind)
    replayed = Replay(steps, layout, Advice(values))
    replayed.slots.evicted = []
    found = replayed.run()
    wanted, evicted = misses(steps, layout, lambda token: values[token])
    assert found.missing.tolist() == wanted
    place = {replayed.slots.place[layer] + e: (layer, e) for layer in range(3) for e in range(8)}
    assert [place[number] for number in replayed.slots.evicted] == evicted
    assert sum(replayed.slots.here) == layout.total - sum(replayed.slots.free)


@pytest.mark.parametrize("slots", [9, 12, 20])
def test_all_zero_is_lru(slots: int) -> None:
    steps = random_steps(5, prompts=False)
    sets = [sorted(layer * 8 + int(e) for e in ids) for token in steps.ids for layer, ids in enumerate(token)]
    layout = shared_slots(3, 8, 3, slots)
    found = replay_policy(steps, layout, make_policy("lru", layout.cache_shape))
    assert int(found.missing.sum()) == sum(lru_misses(sets, slots))


def test_infinity_outlives_everything_finite() -> None:
    layout = shared_slots(1, 6, 1, 3)
    slots = ReplayedSlots(layout)
    slots.use(0, [0])
    pins = np.zeros((1, 6), np.float32)
    pins[0, 0] = np.inf
    slots.set_priorities(pins)
    for expert in (1, 2, 3, 4, 5, 1, 2):
        slots.use(0, [expert])
    assert slots.use(0, [0]) == 0


def fewest_misses(steps: Steps, layout: Layout) -> int:
    """By trying every choice of victims, for one group of layers whose slots hold a layer's set."""
    sets = [frozenset((layer, int(e)) for e in ids) for token in steps.ids for layer, ids in enumerate(token)]

    @cache
    def rest(step: int, resident: frozenset[tuple[int, int]]) -> int:
        if step == len(sets):
            return 0
        wanted = sets[step]
        n_missing = len(wanted - resident)
        return n_missing + min(rest(step + 1, kept) for kept in choices(resident | wanted, wanted))

    def choices(everyone: frozenset[tuple[int, int]], wanted: frozenset[tuple[int, int]]) -> set[frozenset]:
        if len(everyone) <= layout.total:
            return {everyone}
        return {c for e in everyone - wanted for c in choices(everyone - {e}, wanted)}

    return rest(0, frozenset())


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("n_layer", "slots"), [(1, 2), (1, 3), (1, 4), (2, 4), (2, 6)])
def test_belady_is_the_best_of_all_choices(n_layer: int, slots: int, seed: int) -> None:
    steps = random_steps(seed, n_token=8, n_layer=n_layer, n_expert=6, n_used=2, prompts=False)
    layout = shared_slots(n_layer, 6, 2, slots)
    assert int(belady(steps, layout).missing.sum()) == fewest_misses(steps, layout)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_no_policy_beats_belady(layout: Layout, seed: int) -> None:
    steps = random_steps(seed, n_token=80)

    def total(found: object) -> int:
        return int(found.missing.sum() + found.prompt_missing.sum())  # type: ignore[attr-defined]

    least = total(belady(steps, layout))
    for name in POLICIES:
        assert total(replay_policy(steps, layout, make_policy(name, layout.cache_shape))) >= least, name
    assert total(sch(steps, layout)) >= least
    for kind in ("noise", "special"):
        assert total(Replay(steps, layout, Advice(advice(steps, kind))).run()) >= least
    assert least <= int(80 * 3 * 3 + sum(len(e) for _, p in steps.prompts for e in p.experts))


def test_next_uses_by_hand() -> None:
    steps = random_steps(0, n_token=4, n_layer=1, n_expert=4, n_used=1, prompts=False)
    steps.ids[:, 0, 0] = [2, 1, 2, 2]
    after, _ = next_uses(steps)
    never = after[-1, 0, 0]
    assert after[:, 0, 0].tolist() == [2, never, 3, never] and never > 1000


def test_sch_evicts_what_is_used_least_in_the_next_tokens() -> None:
    steps = random_steps(0, n_token=6, n_layer=1, n_expert=4, n_used=1, prompts=False)
    steps.ids[:, 0, 0] = [0, 1, 2, 2, 0, 0]
    layout = own_slots(1, 4, 1, 2)
    # Who looks one token ahead sees neither 0 nor 1 when 2 comes, and lets the older one go.
    assert int(sch(steps, layout, segment=1).missing.sum()) == 4
    assert int(sch(steps, layout, segment=2).missing.sum()) == 3
    assert int(sch(steps, layout, segment=99).missing.sum()) == 3


def test_slots_for_everything_miss_everything_once() -> None:
    steps = random_steps(3, n_token=200, prompts=False)
    used = len({(layer, int(e)) for token in steps.ids for layer, ids in enumerate(token) for e in ids})
    for layout in (shared_slots(3, 8, 3, 24), own_slots(3, 8, 3, 8)):
        for name in POLICIES:
            found = replay_policy(steps, layout, make_policy(name, layout.cache_shape))
            assert int(found.missing.sum()) == used


def test_the_shape_a_policy_sees() -> None:
    assert own_slots(3, 8, 2, 5).cache_shape == CacheShape(3, 8, 2, 15, per_layer=True)
    assert shared_slots(3, 8, 2, 15).cache_shape == CacheShape(3, 8, 2, 15, per_layer=False)
    assert own_slots(3, 8, 2, 99).total == 24
