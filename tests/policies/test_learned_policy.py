"""The learned policy: what it computes token by token is the formula; it learns what follows what; it keeps that."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from pyengine.policies import CacheShape, learned, learning
from pyengine.policies.batches import Batch, shuffled
from pyengine.policies.learned import HALF_LIVES, LearnedPolicy, LearnedPolicyError
from pyengine.policies.learning import fit
from pyengine.replay.hits import replay_policy
from pyengine.replay.layout import own_slots, shared_slots
from pyengine.replay.steps import steps_of
from pyengine.traces import Trace, TracedModel, load_trace

SHAPE = CacheShape(n_layer=2, n_expert=12, n_expert_used=2, slots=10, per_layer=True)


def _cyclic(n_token: int, seed: int = 1) -> npt.NDArray[np.uint16]:
    """Tokens whose experts follow a cycle that restarts at random: frequencies say nothing, the last token all."""
    random = np.random.default_rng(seed)
    ids = np.zeros((n_token, SHAPE.n_layer, 2), np.uint16)
    phase = 0
    for token in range(n_token):
        phase = int(random.integers(6)) if random.random() < 0.05 else (phase + 1) % 6
        ids[token] = [[2 * phase, 2 * phase + 1], [11 - 2 * phase, 10 - 2 * phase]]
    return ids


def _trace(ids: npt.NDArray[np.uint16], n_expert: int = SHAPE.n_expert) -> Trace:
    return Trace(TracedModel("", "", ids.shape[1], n_expert, ids.shape[2]), ids=ids, starts=np.array([0], np.int64))


def _misses(policy: LearnedPolicy, ids: npt.NDArray[np.uint16], slots: int) -> int:
    """Of one cache per layer; a token's experts are never evicted for each other."""
    resident: list[set[int]] = [set() for _ in range(SHAPE.n_layer)]
    priorities = policy.priorities()
    misses = 0
    for token in ids:
        for layer, wanted in enumerate(token.tolist()):
            missing = set(wanted) - resident[layer]
            misses += len(missing)
            for expert in missing:
                if len(resident[layer]) >= slots:
                    others = resident[layer] - set(wanted)
                    resident[layer].remove(min(others, key=lambda e: (priorities[layer, e], e)))
                resident[layer].add(expert)
        policy.observe(token, None)
        priorities = policy.priorities()
    return misses


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Few numbers and few steps: enough for a model of 24 experts."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"_UNITS": 16, "_WIDTH": 24}.items():
            patch.setattr(learned, name, value)
        for name, steps in {"_STEPS": 400, "_PASSES": (4, 8), "FEWEST": 640}.items():
            patch.setattr(learning, name, steps)
        yield


@pytest.fixture(scope="module")
def fitted(small: None) -> LearnedPolicy:
    policy = LearnedPolicy(SHAPE)
    assert fit(policy, _trace(_cyclic(3000)))
    return policy


def test_learns_what_frequencies_cannot_tell(fitted: LearnedPolicy) -> None:
    ids = _cyclic(1500, seed=2)
    knowing = _misses(LearnedPolicy(SHAPE, fitted.save()), ids, slots=6)
    frequencies = _misses(LearnedPolicy(SHAPE), ids, slots=6)
    assert knowing < 0.8 * frequencies


def test_token_by_token_is_the_formula(fitted: LearnedPolicy) -> None:
    arrays = fitted.save()
    policy = LearnedPolicy(SHAPE, arrays)
    known = {name: a.astype(np.float64) for name, a in arrays.items()}
    ids, begin = _cyclic(34, seed=3), 15  # too few to learn from in the run
    n, n_half = SHAPE.n_layer * SHAPE.n_expert, len(HALF_LIVES)
    keep = np.array([0.5 ** (1 / h) if h else 0 for h in HALF_LIVES])[:, None]
    sums, of_text = np.zeros((n_half, n)), np.arange(n_half) >= n_half - 2
    for t, token in enumerate(ids):
        if t == begin:
            policy.begin_sequence()
            sums[of_text] = 0
        policy.observe(token, None)
        used = np.zeros((SHAPE.n_layer, SHAPE.n_expert))
        np.put_along_axis(used, token.astype(np.int64), 1, axis=1)
        sums = sums * keep + used.ravel() * (1 - keep)
    position = len(ids) - begin
    worth = 1 - keep**position + 4 * (1 - keep)  # of the text's tokens, and of four that used nothing
    uses = np.where(of_text[:, None], sums / worth, sums)
    where = np.exp(-position / np.array([4, 16, 64, 256, np.inf]))
    floor = np.array([0.1] + [0.02] * (n_half - 1))[:, None]
    odds = where @ known["bias"] + (where @ known["mix"]) @ np.log(uses + floor)
    inputs = np.concatenate([(uses @ known["embed"]).ravel(), where])
    odds += np.tanh(inputs @ known["into"] + known["offset"]) @ known["out"]
    priorities = policy.priorities()
    assert priorities.dtype == np.float32
    np.testing.assert_allclose(priorities, odds.reshape(priorities.shape), atol=1e-3)


def test_a_prompt_counts_as_its_average_token(fitted: LearnedPolicy) -> None:
    decoded, prompted = (LearnedPolicy(SHAPE, fitted.save()) for _ in range(2))
    same = np.array([[1, 4], [2, 7]], np.uint16)
    pairs = np.zeros((SHAPE.n_layer, SHAPE.n_expert), np.int64)
    np.put_along_axis(pairs, same.astype(np.int64), 20, axis=1)
    for _ in range(20):
        decoded.observe(same, None)
    prompted.observe_prompt(pairs)
    np.testing.assert_allclose(prompted.priorities(), decoded.priorities(), atol=1e-3)
    for policy in (decoded, prompted):  # and goes on alike
        policy.observe(np.array([[0, 11], [5, 6]], np.uint16), None)
    np.testing.assert_allclose(prompted.priorities(), decoded.priorities(), atol=1e-3)


def test_an_empty_prompt_changes_nothing(fitted: LearnedPolicy) -> None:
    policy = LearnedPolicy(SHAPE, fitted.save())
    policy.observe(np.array([[1, 4], [2, 7]], np.uint16), None)
    before = policy.priorities()
    policy.observe_prompt(np.zeros((SHAPE.n_layer, SHAPE.n_expert), np.int64))
    np.testing.assert_allclose(policy.priorities(), before, atol=1e-5)


def test_unlearned_prefers_recent_and_frequent() -> None:
    policy = LearnedPolicy(SHAPE)
    assert policy.save() == {}
    for token in ([3, 5], [3, 6], [3, 7], [1, 2]):
        policy.observe(np.array([token, token], np.uint16), None)
    first = policy.priorities()[0]
    assert first[3] > first[7] > first[5] > first[0]
    assert first[1] > first[7]


def test_learning_goes_on_from_what_is_known(fitted: LearnedPolicy) -> None:
    policy = LearnedPolicy(SHAPE, fitted.save())
    before = policy.save()
    noise = np.random.default_rng(5).permuted(np.tile(np.arange(12, dtype=np.uint16), (700, 2, 1)), axis=2)[:, :, :2]
    better = fit(policy, _trace(np.ascontiguousarray(noise)))
    changed = any(not np.array_equal(before[name], a) for name, a in policy.save().items())
    assert better == changed


def test_too_short_a_trace_teaches_nothing() -> None:
    policy = LearnedPolicy(SHAPE)
    assert not fit(policy, _trace(_cyclic(300)))
    assert policy.save() == {}


def test_learning_stops_when_asked() -> None:
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 3

    policy = LearnedPolicy(SHAPE)
    assert not fit(policy, _trace(_cyclic(2000)), stop)
    assert asked == 4 and policy.save() == {}


@pytest.mark.parametrize("damage", ["shape", "missing", "more", "nan", "half_lives"])
def test_what_does_not_fit_is_refused_whole(fitted: LearnedPolicy, damage: str) -> None:
    arrays = fitted.save()
    if damage == "shape":
        arrays["bias"] = arrays["bias"][:, :-1]
    elif damage == "missing":
        del arrays["out"]
    elif damage == "more":
        arrays["further"] = arrays["bias"]
    elif damage == "nan":
        arrays["mix"] = arrays["mix"] * np.float16("nan")
    else:
        arrays["half_lives"] = arrays["half_lives"] + 1
    policy = LearnedPolicy(SHAPE)
    before = policy.priorities()
    with pytest.raises(LearnedPolicyError):
        policy.load(arrays)
    np.testing.assert_array_equal(policy.priorities(), before)
    assert policy.save() == {}


def test_the_trace_of_another_model_is_refused() -> None:
    with pytest.raises(LearnedPolicyError, match="other numbers of layers"):
        fit(LearnedPolicy(SHAPE), _trace(_cyclic(1000), n_expert=16))


def test_averages_never_become_denormal() -> None:
    policy = LearnedPolicy(SHAPE)
    token = np.array([[0, 1], [2, 3]], np.uint16)
    policy.observe(np.array([[8, 9], [8, 9]], np.uint16), None)
    for _ in range(400):
        policy.observe(token, None)
    smallest = float(np.abs(policy._past.sums).min())
    assert smallest >= np.finfo(np.float32).tiny


def test_misses_on_real_routing_are_those_of_last_time() -> None:
    """Before anything is learned. Logarithms are rounded differently from machine to machine."""
    steps = steps_of(load_trace(Path(__file__).parents[1] / "replay" / "gpt_oss_slice.npz"))
    for layout, misses in ((own_slots(24, 32, 4, 12), 5347), (shared_slots(24, 32, 4, 384), 1941)):
        found = replay_policy(steps, layout, LearnedPolicy(layout.cache_shape)).missing.sum()
        assert int(found) == pytest.approx(misses, rel=2e-3)


def test_a_new_text_forgets_the_text_before(fitted: LearnedPolicy) -> None:
    policies = [LearnedPolicy(SHAPE, fitted.save()) for _ in range(2)]
    for policy, seed in zip(policies, (6, 7), strict=True):
        for token in _cyclic(30, seed=seed):
            policy.observe(token, None)
        policy.begin_sequence()
    of_text = [p._past.sums[0][-2:] for p in policies]
    np.testing.assert_array_equal(of_text[0], of_text[1])
    assert not np.array_equal(policies[0]._past.sums, policies[1]._past.sums)
    first, second = (p.priorities() for p in policies)
    assert not np.array_equal(first, second), "what is true of all texts is kept"


def test_shuffling_keeps_every_token() -> None:
    def batches() -> Iterator[Batch]:
        for i in range(7):
            rows = np.arange(3 * i, 3 * i + 3, dtype=np.float32)
            yield Batch(rows[:, None, None], rows[:, None], rows[:, None], rows[:, None])

    out = list(shuffled(batches(), np.random.default_rng(0), 4))
    seen = np.concatenate([batch.where[:, 0] for batch in out])
    assert sorted(seen.tolist()) == list(range(21)) and seen.tolist() != list(range(21))
    for batch in out:
        np.testing.assert_array_equal(batch.uses[:, 0], batch.ahead)
        np.testing.assert_array_equal(batch.counts, batch.where)
