"""Time: what computes and moves when, queue rules, and the figures that follow."""

from __future__ import annotations

import numpy as np
import pytest
from brute_force import random_steps

from pyengine.policies import make_policy
from pyengine.replay.admission import Admission
from pyengine.replay.hits import replay_policy
from pyengine.replay.layout import Layout, own_slots, shared_slots
from pyengine.replay.predictors import (
    Correlation,
    Given,
    Popularity,
    Predictor,
    RepeatLast,
    Simulated,
    TokenTable,
)
from pyengine.replay.quality import recall
from pyengine.replay.steps import Steps
from pyengine.replay.tally import Tally
from pyengine.replay.timed import Prefetching, TimedReplay
from pyengine.replay.timing import CHUNK_BYTES, Timing
from pyengine.replay.transfers import Transfer, Transfers

MB = 10**6


def timed(
    steps: Steps,
    layout: Layout,
    timing: Timing,
    predictor: Predictor | None = None,
    policy: str = "lru",
    distance: int = 1,
    more: int = 0,
    least_chance: float = 0.0,
) -> Tally:
    made = make_policy(policy, layout.cache_shape)
    rules = Prefetching(distance, more, least_chance)
    return TimedReplay(steps, layout, made, timing, predictor, rules).run_timed()


@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize("slots", [1, 2, 4, 9, 15, 24])
def test_without_a_predictor_hits_are_those_without_time(slots: int, policy: str) -> None:
    steps, layout = random_steps(1), shared_slots(3, 8, 3, slots)
    tally = timed(steps, layout, Timing(100 * MB, MB, 0.01), policy=policy)
    plain = replay_policy(steps, layout, make_policy(policy, layout.cache_shape))
    assert tally.miss.tolist() == plain.missing.tolist()
    assert tally.wanted.tolist() == plain.wanted.tolist()
    assert tally.bytes_demand == MB * plain.missing.sum()
    assert not tally.in_time.any() and not tally.late.any() and tally.bytes_prefetch == tally.bytes_wasted == 0


def test_the_time_of_a_token_by_hand() -> None:
    """One layer of two experts, 4 ms: router after 2 ms, each expert 1 ms. A load takes 5 ms."""
    steps = random_steps(0, n_token=3, n_layer=1, n_expert=4, n_used=2, prompts=False)
    steps.ids[:, 0] = [[0, 1], [0, 1], [0, 2]]
    tally = timed(steps, own_slots(1, 4, 2, 2), Timing(100 * MB, MB // 2, 0.004))
    # 2, then loads land at 7 and 12 and compute until 13; all here: until 17; one here computes until 20, the other
    # lands at 24 and computes until 25.
    assert tally.total_s == pytest.approx(0.013 + 0.004 + 0.008)
    assert tally.stall_s == pytest.approx(0.005 + 0.004 + 0.004)
    assert tally.figures(Timing(100 * MB, MB // 2, 0.004))["tokens_per_s"] == pytest.approx(3 / 0.025)


def test_a_prefetch_lands_in_time_late_or_not_at_all() -> None:
    """Two layers of one expert that changes with every token; a sure predictor; how long a load takes decides."""
    steps = random_steps(0, n_token=40, n_layer=2, n_expert=8, n_used=1, prompts=False)
    steps.ids[:, :, 0] = np.arange(40)[:, None] % 8
    layout = own_slots(2, 8, 1, 2)

    def tally(load_ms: float) -> Tally:
        return timed(steps, layout, Timing(MB / load_ms * 1e3, MB, 0.008), Simulated(steps, 1.0))

    quick = tally(1.0)  # a layer takes 4 ms, its router speaks after 2
    assert quick.in_time.tolist() == [40, 40] and quick.stall_s == 0 and quick.total_s == pytest.approx(0.32)
    slow = tally(3.0)  # the first layer has 2 ms, the second 3 from the first's router on, of which 1 is demand
    assert slow.in_time.sum() + slow.late.sum() == 80 and slow.late[0] == 40
    assert slow.stall_s > 0
    assert slow.total_s < timed(steps, layout, Timing(MB / 3.0 * 1e3, MB, 0.008)).total_s
    for found in (quick, slow):
        assert found.bytes_demand + found.bytes_prefetch == pytest.approx(80 * MB)
        assert found.bytes_wasted == 0 and not found.miss.any()


def test_a_predictor_that_is_always_wrong_brings_nothing_in_time() -> None:
    steps = random_steps(2, n_token=80, prompts=False)
    tally = timed(steps, own_slots(3, 8, 3, 4), Timing(2000 * MB, MB, 0.01), Simulated(steps, 0.0))
    assert not tally.late.any() and not tally.right.any() and not tally.absent_named.any()
    # Now and then an expert stays until a later token wants it.
    assert tally.in_time.sum() < 0.02 * tally.wanted.sum()
    assert tally.bytes_wasted == pytest.approx(tally.bytes_prefetch - MB * tally.in_time.sum())
    assert tally.bytes_wasted > 0
    figures = tally.figures(Timing(2000 * MB, MB, 0.01))
    assert figures["accuracy"] == figures["good_pred"] == figures["good_pred_direct"] == figures["recall"] == 0


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 7, 12, 24])
@pytest.mark.parametrize("speed", [20 * MB, 300 * MB, 10**12])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_books_balance_at_every_size(slots: int, speed: float, share: float) -> None:
    """Few slots, prefetches in the way of demand loads, prompts between: every access is counted, and every byte."""
    steps, layout = random_steps(3), shared_slots(3, 8, 3, slots)
    timing = Timing(speed, MB, 0.01)
    rules = Prefetching(distance=2, more=2, least_chance=0)
    replay = TimedReplay(steps, layout, make_policy("lfu", layout.cache_shape), timing, Simulated(steps, share), rules)
    tally = replay.run_timed()
    assert tally.wanted.tolist() == [180] * 3
    assert (tally.right <= tally.named).all() and (tally.right_here <= tally.named_here).all()
    assert 0 <= tally.bytes_wasted <= tally.bytes_prefetch + 1e-6
    moved = tally.bytes_demand + tally.bytes_prefetch
    needed = MB * float(tally.in_time.sum() + tally.late.sum() + tally.miss.sum())
    assert moved >= needed - 1e-6 - tally.bytes_wasted
    assert tally.total_s >= 60 * 0.01 - 1e-9
    assert tally.total_s >= 60 * 0.01 + tally.stall_s - 1e-9
    assert sum(replay.slots.here) <= layout.total


def test_a_perfect_predictor_on_an_endless_disk_leaves_nothing_to_wait_for() -> None:
    steps = random_steps(4, prompts=False)
    tally = timed(steps, own_slots(3, 8, 3, 4), Timing(10**15, MB, 0.01), Simulated(steps, 1.0))
    figures = tally.figures(Timing(10**15, MB, 0.01))
    assert figures["recall"] == figures["accuracy"] == figures["recall_on_misses"] == 1
    assert figures["hit_rate"] == figures["good_pred"] == figures["good_pred_direct"] > 0.99, "room must be found first"
    assert figures["stall_share"] == 0 and figures["wasted_bytes_per_token"] == 0


# ---- queues


def make_transfers(speed: float, n_bytes: int) -> tuple[Transfers, list[int]]:
    landed: list[int] = []
    return Transfers(Timing(speed, n_bytes, 1.0), lambda t: landed.append(t.expert)), landed


def test_a_demand_load_waits_for_one_chunk_at_most() -> None:
    transfers, landed = make_transfers(CHUNK_BYTES, 10 * CHUNK_BYTES)  # a chunk a second
    transfers.low.append(Transfer(1, 0, 0.0, 10.0 * CHUNK_BYTES))
    transfers.prefetch_until(3.5)
    assert transfers.low[0].left == 6 * CHUNK_BYTES, "the fourth chunk is in flight"
    assert transfers.demand(2.0 * CHUNK_BYTES, 3.5) == pytest.approx(6.0)
    transfers.prefetch_until(11.9)
    assert not landed
    transfers.prefetch_until(12.0)
    assert landed == [1]


def test_prefetches_move_in_order_and_not_before_they_are_asked_for() -> None:
    transfers, landed = make_transfers(MB, MB)
    for expert, since in ((1, 0.0), (2, 5.0), (3, 5.0)):
        transfers.low.append(Transfer(expert, 0, since, float(MB)))
    transfers.prefetch_until(1.0)
    assert landed == [1]
    transfers.prefetch_until(5.9)
    assert landed == [1]
    transfers.prefetch_until(7.0)
    assert landed == [1, 2, 3]


def test_the_last_chunk_in_flight_has_not_landed() -> None:
    transfers, landed = make_transfers(MB, MB // 10)  # less than a chunk
    transfers.low.append(Transfer(1, 0, 0.0, MB / 10))
    transfers.prefetch_until(0.05)
    assert not landed and transfers.low[0].left == 0
    transfers.prefetch_until(0.1)
    assert landed == [1]


def test_what_does_not_come_true_is_not_fetched_any_more() -> None:
    steps = random_steps(2, n_token=200, prompts=False)
    layout, timing = own_slots(3, 8, 3, 4), Timing(2000 * MB, MB, 0.01)
    all_of_them = timed(steps, layout, timing, Simulated(steps, 0.0))
    admitted = timed(steps, layout, timing, Simulated(steps, 0.0), least_chance=0.4)
    assert all_of_them.bytes_wasted > 0
    assert admitted.bytes_wasted < 0.1 * all_of_them.bytes_wasted
    assert admitted.total_s <= all_of_them.total_s
    every, perfect = (timed(steps, layout, timing, Simulated(steps, 1.0), least_chance=c) for c in (0.0, 0.4))
    assert perfect.in_time.sum() > 0.9 * every.in_time.sum(), "but for the first, whom nobody believes"


def test_room_grows_while_prefetches_arrive_and_shrinks_when_they_do_not() -> None:
    admission = Admission(1, 4)
    assert admission.has_room(1) and not admission.has_room(2)
    for _ in range(4):
        admission.arrived(2, 0)
    assert admission.has_room(2) and not admission.has_room(3)
    admission.arrived(0, 0)
    admission.arrived(1, 0)
    assert admission.has_room(2) and not admission.has_room(3), "what was not tried says nothing"
    for _ in range(50):
        admission.arrived(3, 1)
    assert admission.has_room(0) and not admission.has_room(1)


def test_each_rank_has_its_own_record() -> None:
    admission = Admission(2, 2, least_chance=0.5)
    for _ in range(30):
        admission.judge(0, [(7, 0, 3), (8, 1, 3)], {7})
    assert admission.chance(0, 0, 3) > 0.8 and admission.chance(0, 1, 3) < 0.2


def test_a_layer_that_has_shown_nothing_is_believed_as_the_others_are() -> None:
    admission = Admission(2, 2, least_chance=0.4)
    assert not admission.likely(admission.chance(1, 0, 3)), "nothing is read on faith"
    for _ in range(30):
        admission.judge(0, [(7, 0, 3), (8, 1, 3)], {7})
    assert admission.likely(admission.chance(1, 0, 3)) and not admission.likely(admission.chance(1, 1, 3))


@pytest.mark.parametrize(("needed", "share", "pays"), [(0.05, 1.0, True), (0.05, 0.1, True), (0.6, 1.0, False)])
def test_a_read_must_outweigh_what_is_pushed_out(needed: float, share: float, pays: bool) -> None:
    admission = Admission(2, 1)
    for n in range(200):
        admission.moved(share)
        admission.pays(0.9, 5, 1)
        admission.judge(1, [], {5} if n % 20 < 20 * needed else set())
    assert admission.pays(0.9, 5, 1) == pays
    assert admission.pays(0.9, None, 1), "there is an empty slot"


def test_what_comes_too_late_is_not_worth_much() -> None:
    admission = Admission(2, 1)
    for share, pays in ((1.0, True), (0.05, False)):
        for n in range(200):
            admission.moved(share)
            admission.pays(0.9, 5, 1)
            admission.judge(1, [], {5} if n % 4 == 0 else set())
        assert admission.pays(0.9, 5, 1) == pays


def test_who_stands_well_with_the_policy_is_more_likely() -> None:
    admission = Admission(1, 1, least_chance=0.5)
    for _ in range(30):
        admission.judge(0, [(7, 0, 0), (8, 0, 7)], {7})
    assert admission.chance(0, 0, 0) > 0.6 > 0.4 > admission.chance(0, 0, 7)


# ---- predictors


def with_tokens(steps: Steps) -> Steps:
    chance = np.random.default_rng(9)
    return Steps(
        steps.ids, None, chance.integers(0, 5, steps.n_token).astype(np.int32), steps.starts, (), steps.n_expert
    )


ONLINE = {
    "repeat": RepeatLast,
    "popularity": Popularity,
    "correlation 1": lambda steps: Correlation(steps, 1),
    "correlation 2": lambda steps: Correlation(steps, 2),
    "tokens": TokenTable,
}


@pytest.mark.parametrize("name", ONLINE)
def test_predictors_know_nothing_of_what_comes(name: str) -> None:
    steps = with_tokens(random_steps(6, prompts=False))
    other = with_tokens(random_steps(7, prompts=False))
    token, layer, known = 30, 2, 1
    other.ids[:token] = steps.ids[:token]
    other.ids[token, :known] = steps.ids[token, :known]
    answers = []
    for world in (steps, other):
        predictor = ONLINE[name](world)
        for t in range(token):
            predictor.observe(t)
        answers.append((predictor.predict(token, layer, known), predictor.next_token(token)))
    (mine, mine_ahead), (theirs, theirs_ahead) = answers
    assert mine is not None
    np.testing.assert_array_equal(mine, theirs)
    assert mine.shape == (8,) and mine.min() >= 0 and mine.max() <= 1
    if mine_ahead is not None:
        np.testing.assert_array_equal(mine_ahead, theirs_ahead)
        assert mine_ahead.shape == (3, 8)


def test_what_predictors_say_by_hand() -> None:
    steps = with_tokens(random_steps(0, n_token=4, n_layer=2, n_expert=4, n_used=1, prompts=False))
    steps.ids[:, 0, 0], steps.ids[:, 1, 0] = [0, 0, 1, 0], [2, 3, 1, 0]
    assert steps.tokens is not None
    steps.tokens[:] = [7, 8, 7, 7]
    made = {name: make(steps) for name, make in ONLINE.items()}
    for predictor in made.values():
        for token in range(3):
            predictor.observe(token)

    def says(name: str, layer: int, known: int) -> list[float]:
        scores = made[name].predict(3, layer, known)
        assert scores is not None
        return scores.tolist()

    assert says("repeat", 1, 1) == [0, 1, 0, 0]
    assert says("popularity", 0, 0) == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert says("correlation 1", 1, 1) == [0, 0, 0.5, 0.5], "after expert 0 came 2 and 3"
    assert says("correlation 1", 1, 0) == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3]), "popularity until it is known"
    assert says("tokens", 1, 1) == [0, 0.5, 0.5, 0]


def test_a_simulated_predictor_has_the_recall_it_was_asked_for() -> None:
    steps = random_steps(8, n_token=400, prompts=False)
    for share in (0.0, 0.6, 1.0):
        found = recall(steps, Simulated(steps, share), 1, 0)
        assert found.at_k.mean() == pytest.approx(share, abs=0.03)


def test_given_scores_are_taken_as_they_are() -> None:
    steps = random_steps(8, n_token=50, prompts=False)
    scores = np.full((50, 3, 8), np.nan)
    rows = np.arange(3)[:, None]
    for token, ids in enumerate(steps.ids):
        scores[token, rows, ids] = [3.0, 2.0, 1.0]
        scores[token, 0] = np.nan  # the first layer cannot be predicted
    found = recall(steps, Given(scores), 1, 2)
    assert found.at_k.tolist() == found.at_more.tolist() == [0, 1, 1]
    assert found.exact.tolist() == [0, 1, 1]


def test_more_names_find_more() -> None:
    steps = random_steps(8, n_token=200, prompts=False)
    found = recall(steps, Popularity(steps), 1, 2)
    assert (found.at_more > found.at_k).all()
    assert found.as_json()["recall_at_k"] == pytest.approx(found.at_k.mean())


def test_a_table_of_tokens_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TokenTable, "MOST", 3)
    steps = with_tokens(random_steps(8, prompts=False))
    table = TokenTable(steps)
    for token in range(60):
        table.observe(token)
    assert steps.tokens is not None
    recent = list(dict.fromkeys(steps.tokens[::-1].tolist()))
    assert table.next_token(steps.tokens.tolist().index(recent[0])) is not None
    assert table.next_token(steps.tokens.tolist().index(recent[-1])) is None
