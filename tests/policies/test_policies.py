"""Each policy gives the priorities that its paper asks for."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
from numpy.typing import NDArray

from pyengine.errors import UsageError
from pyengine.policies import POLICIES, CacheShape, as_one_text, make_policy
from pyengine.policies.activation_path import ActivationPathPolicy
from pyengine.policies.arc import ArcLists, ArcPolicy
from pyengine.policies.expert_map import ExpertMapPolicy
from pyengine.policies.lfu import DECAY, DecayedCounts, LfuPolicy
from pyengine.policies.mrs import NEWEST, MrsPolicy
from pyengine.policies.next_use import NextUsePolicy
from pyengine.policies.shallow import ShallowPolicy, layers_to_pin

SMALL = CacheShape(n_layer=3, n_expert=10, n_expert_used=2, slots=15)


def random_ids(shape: CacheShape, n: int, seed: int) -> NDArray[np.uint16]:
    """uint16 [n, n_layer, n_expert_used], some experts more often than others."""
    chance = np.random.default_rng(seed)
    scores = chance.random((n, shape.n_layer, shape.n_expert)) * np.linspace(1, 2, shape.n_expert)
    return np.argsort(-scores, axis=2)[:, :, : shape.n_expert_used].astype(np.uint16)


def random_pairs(shape: CacheShape, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, 9, (shape.n_layer, shape.n_expert))


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("slots", [3, 15, 24, 30])
@pytest.mark.parametrize("name", POLICIES)
def test_priorities_are_numbers_of_the_right_shape_and_the_same_every_time(
    name: str, slots: int, per_layer: bool
) -> None:
    shape = CacheShape(3, 10, 2, slots, per_layer)
    ids = random_ids(shape, 60, seed=1)
    given = [np.array(i) for i in ids]
    seen = []
    for _ in range(2):
        policy = make_policy(name, shape)
        answers = [policy.priorities()]
        for i, token in enumerate(ids):
            if i % 20 == 0:
                policy.begin_sequence()
                policy.observe_prompt(random_pairs(shape, i))
            policy.observe(token, None if i % 2 else np.full(token.shape, 0.5, np.float32))
            answer = policy.priorities()
            assert answer.shape == (3, 10) and answer.dtype == np.float32
            assert not np.isnan(answer).any() and not np.isneginf(answer).any()
            answers.append(answer)
            kept = answer.copy()
            answer[:] = 7  # the caller may change it
            np.testing.assert_array_equal(policy.priorities(), kept)
        seen.append(answers[0])
        seen.append(kept)
    np.testing.assert_array_equal(seen[0], seen[2])
    np.testing.assert_array_equal(seen[1], seen[3])
    np.testing.assert_array_equal(np.array(given), ids, "what was observed is unchanged")


def test_a_name_that_is_not_in_the_table() -> None:
    with pytest.raises(UsageError, match="no cache policy 'fifo'; there are lru, lfu"):
        make_policy("fifo", SMALL)


def test_lru_has_no_opinion() -> None:
    policy = make_policy("lru", SMALL)
    policy.observe(random_ids(SMALL, 1, 0)[0], None)
    assert not policy.priorities().any()


def test_lfu_ranks_by_decayed_counts() -> None:
    policy, counts = LfuPolicy(SMALL), np.zeros((3, 10))
    for token in random_ids(SMALL, 3000, seed=2):  # long enough for the weights to be scaled back
        policy.observe(token, None)
        counts *= DECAY
        np.put_along_axis(counts, token.astype(int), np.take_along_axis(counts, token.astype(int), 1) + 1, 1)
    given = policy.priorities()
    np.testing.assert_allclose(given / given.max(), counts / counts.max(), rtol=1e-3)


def test_a_prompt_counts_like_tokens_that_use_its_average() -> None:
    counts, by_hand = DecayedCounts(SMALL, 0.9), np.zeros((3, 10))
    pairs = np.zeros((3, 10), np.int64)
    pairs[:, 1], pairs[:, 2] = 6, 2  # 4 tokens of two experts each
    counts.add(np.full((3, 2), [4, 5], np.uint16))
    by_hand[:, [4, 5]] = 1
    counts.add_prompt(pairs, 2.0)
    for _ in range(4):
        by_hand = by_hand * 0.9 + pairs / 8 * 2
    np.testing.assert_allclose(counts.normalised(), by_hand, rtol=1e-5)


@pytest.mark.parametrize("name", POLICIES)
def test_a_token_of_each_of_several_texts_is_as_one_token(name: str) -> None:
    """Texts that agree, or one alone: what a policy makes of frequency must be the same. Others only must accept it."""
    one, many = make_policy(name, SMALL), make_policy(name, SMALL)
    for ids in random_ids(SMALL, 60, seed=4):
        pairs = np.zeros((3, 10), np.int64)
        np.put_along_axis(pairs, ids.astype(int), 1, 1)
        one.observe_prompt(pairs)
        many.observe_prompt(as_one_text(16 * pairs, 2, (1,) * 16))
    if name not in ("arc", "shallow"):  # they count no uses
        np.testing.assert_allclose(many.priorities(), one.priorities(), rtol=1e-4, atol=1e-6)
    assert np.isfinite(many.priorities()).any()


def test_many_texts_remember_as_many_steps_as_one() -> None:
    """Two steps ago counts DECAY ** 2, however many texts there are and however long a prompt's chunk among them."""
    policy = LfuPolicy(SMALL)
    for expert, shares in ((4, (1,) * 16), (5, (1, 1, 62)), (6, (1,) * 16)):
        pairs = np.zeros((3, 10), np.int64)
        pairs[:, [expert, 9]] = sum(shares)  # two experts each
        policy.observe_prompt(as_one_text(pairs, 2, shares))
    given = policy.priorities()[0]
    np.testing.assert_allclose(given[[4, 5]] / given[6], [DECAY**2, DECAY], rtol=1e-5)
    prompts = LfuPolicy(SMALL)
    for expert in (4, 5):
        pairs = np.zeros((3, 10), np.int64)
        pairs[:, [expert, 9]] = 80
        prompts.observe_prompt(as_one_text(pairs, 2, (40, 40)))
    given = prompts.priorities()[0]
    np.testing.assert_allclose(given[4] / given[5], DECAY**40, rtol=1e-4)


def test_a_prompt_of_any_length_is_finite() -> None:
    counts = DecayedCounts(SMALL, 0.5)
    counts.add_prompt(np.full((3, 10), 1 << 40), 2.0)
    assert np.isfinite(counts.values).all() and counts.normalised()[0, 0] > 0


def test_mrs_averages_what_routers_give() -> None:
    policy, scores = MrsPolicy(SMALL), np.zeros((3, 10))
    chance = np.random.default_rng(3)
    for token in random_ids(SMALL, 200, seed=3):
        weights = chance.random(token.shape).astype(np.float32)
        policy.observe(token, weights)
        top = np.zeros((3, 10))
        np.put_along_axis(top, token.astype(int), weights, 1)
        scores = NEWEST * top + (1 - NEWEST) * scores
    given = policy.priorities()
    np.testing.assert_allclose(given / given.max(), scores / scores.max(), rtol=1e-3)


def test_mrs_without_weights_goes_by_rank_if_there_is_one() -> None:
    ranked, unranked = MrsPolicy(SMALL), MrsPolicy(SMALL)
    ranked.observe(np.full((3, 2), [7, 4], np.uint16), None)
    unranked.observe(np.full((3, 2), [4, 7], np.uint16), None)
    first, second = ranked.priorities()[:, 7], ranked.priorities()[:, 4]
    np.testing.assert_allclose(first, 2 * second)
    np.testing.assert_array_equal(unranked.priorities()[:, 7], unranked.priorities()[:, 4])


class TextbookArc:
    """ARC as Megiddo and Modha print it, one request at a time."""

    def __init__(self, c: int) -> None:
        self.c, self.p = c, 0.0
        self.t1, self.t2, self.b1, self.b2 = (OrderedDict[int, None]() for _ in range(4))

    def replace(self, in_b2: bool) -> None:
        if self.t1 and (len(self.t1) > self.p or (in_b2 and len(self.t1) == self.p)):
            self.b1[self.t1.popitem(last=False)[0]] = None
        else:
            self.b2[self.t2.popitem(last=False)[0]] = None

    def use(self, x: int) -> None:
        t1, t2, b1, b2, c = self.t1, self.t2, self.b1, self.b2, self.c
        if x in t1 or x in t2:
            t1.pop(x, None)
            t2.pop(x, None)
            t2[x] = None
        elif x in b1:
            self.p = min(c, self.p + max(1, len(b2) / len(b1)))
            self.replace(False)
            del b1[x]
            t2[x] = None
        elif x in b2:
            self.p = max(0, self.p - max(1, len(b1) / len(b2)))
            self.replace(True)
            del b2[x]
            t2[x] = None
        else:
            if len(t1) + len(b1) == c:
                if len(t1) < c:
                    b1.popitem(last=False)
                    self.replace(False)
                else:
                    t1.popitem(last=False)
            elif len(t1) + len(t2) + len(b1) + len(b2) >= c:
                if len(t1) + len(t2) + len(b1) + len(b2) == 2 * c:
                    b2.popitem(last=False)
                if len(t1) + len(t2) == c:
                    self.replace(False)
            t1[x] = None


@pytest.mark.parametrize("seed", range(6))
def test_arc_is_the_textbooks_when_experts_come_one_by_one(seed: int) -> None:
    chance = np.random.default_rng(seed)
    capacity, n = int(chance.integers(2, 9)), 20
    lists, textbook = ArcLists(np.array([capacity]), n), TextbookArc(capacity)
    moved = False
    for i in range(600):
        x = int(chance.integers(0, n if i // 100 % 2 else 8))
        lists.use(np.array([[x]]))
        textbook.use(x)
        t1, t2 = (set(np.flatnonzero(row[0]).tolist()) for row in lists.listed())
        assert (t1, t2) == (set(textbook.t1), set(textbook.t2)), i
        assert bool(lists.t1_goes_first()[0]) == (len(textbook.t1) > textbook.p)
        moved |= 0 < textbook.p < capacity
    assert moved, "the target must have been adapted"


def test_rows_of_arc_do_not_touch_each_other() -> None:
    together = ArcLists(np.array([4, 7]), 12)
    alone = [ArcLists(np.array([4]), 12), ArcLists(np.array([7]), 12)]
    chance = np.random.default_rng(5)
    for _ in range(300):
        members = np.stack([chance.choice(12, 3, replace=False) for _ in range(2)])
        together.use(members)
        for row, one in enumerate(alone):
            one.use(members[row : row + 1])
            for mine, theirs in zip(one.listed(), together.listed(), strict=True):
                np.testing.assert_array_equal(mine[0], theirs[row])


def test_arc_keeps_as_many_as_there_are_slots() -> None:
    for shape in (SMALL, CacheShape(3, 10, 2, 15, per_layer=True)):
        policy = ArcPolicy(shape)
        for token in random_ids(shape, 200, seed=6):
            policy.observe(token, None)
        kept = policy.priorities() > 0
        assert kept.sum() == 15
        assert not shape.per_layer or kept.sum(axis=1).tolist() == [5, 5, 5]


def test_stamps_of_arc_survive_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(SMALL, 400, seed=7)
    plain = ArcPolicy(SMALL)
    for token in ids:
        plain.observe(token, None)
    monkeypatch.setattr("pyengine.policies.arc._LATE", 500)
    renewed = ArcPolicy(SMALL)
    for token in ids:
        renewed.observe(token, None)
    np.testing.assert_array_equal(plain.priorities(), renewed.priorities())


def test_shallow_pins_the_first_layers_that_fit() -> None:
    assert layers_to_pin(CacheShape(24, 32, 4, 288)) == 3
    assert layers_to_pin(CacheShape(24, 32, 4, 24 * 8 + 24)) == 1
    assert layers_to_pin(CacheShape(24, 32, 4, 24 * 8)) == 0
    assert layers_to_pin(CacheShape(24, 32, 4, 288, per_layer=True)) == 0
    shape = CacheShape(6, 10, 2, 44)
    policy = ShallowPolicy(shape)
    for token in random_ids(shape, 100, seed=8):
        policy.observe(token, None)
    given = policy.priorities()
    assert np.isposinf(given[:3]).all() and np.isfinite(given[3:]).all()
    assert (given[3:] > 0).sum(axis=1).tolist() == [4, 4, 4], "the rest is split evenly"


def test_a_request_like_a_past_one_is_expected_to_go_on_like_it() -> None:
    policy = ActivationPathPolicy(SMALL)
    first, second = [[0, 1], [2, 3]], [[5, 6], [7, 8]]
    for kind in (first, second):
        policy.begin_sequence()
        for experts in kind:
            policy.observe(np.full((3, 2), experts, np.uint16), None)
    policy.begin_sequence()
    policy.observe(np.full((3, 2), first[0], np.uint16), None)
    given = policy.priorities()
    assert (given[:, [2, 3]] > given[:, [7, 8]]).all()
    assert (np.diff(given[:, 2]) < 0).all(), "early layers are worth more"
    prompt = np.zeros((3, 10), np.int64)
    prompt[:, [5, 6]] = 3
    policy.observe_prompt(prompt)
    given = policy.priorities()
    assert (given[:, [7, 8]] > given[:, [2, 3]]).all(), "a prompt begins a request, here like the second"


def test_what_followed_a_similar_token_is_expected_again() -> None:
    policy = ExpertMapPolicy(SMALL)
    maps = [np.full((3, 2), experts, np.uint16) for experts in ([0, 1], [2, 3], [4, 5], [6, 7])]
    for i in range(40):
        policy.observe(maps[i % 4], None)
    given = policy.priorities()  # after the fourth comes the first
    assert (given[:, [0, 1]].min(axis=1) > given[:, 2:].max(axis=1)).all()


def test_maps_make_room_for_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyengine.policies.expert_map._MAPS", 16)
    policy = ExpertMapPolicy(SMALL)
    for token in random_ids(SMALL, 50, seed=9):
        policy.observe(token, None)
    ahead = [np.full((3, 2), experts, np.uint16) for experts in ([0, 1], [2, 3])]
    for i in range(21):
        policy.observe(ahead[i % 2], None)
    given = policy.priorities()
    assert (given[:, [2, 3]].min(axis=1) > given[:, 4:].max(axis=1)).all()


def test_what_a_predictor_names_goes_before_everything_once() -> None:
    policy = NextUsePolicy(SMALL)
    for _ in range(50):
        policy.observe(np.full((3, 2), [0, 1], np.uint16), None)
    scores = np.zeros((3, 10), np.float32)
    scores[:, 8], scores[:, 9], scores[0, 0] = 0.9, 0.2, np.nan
    policy.look_ahead(scores)
    given = policy.priorities()
    assert (given[:, 8] > given[:, 9]).all() and (given[:, 9] > given[:, 0]).all()
    policy.observe(np.full((3, 2), [0, 1], np.uint16), None)
    given = policy.priorities()
    assert (given[:, 0] > given[:, 8]).all(), "a prediction is for one token"
