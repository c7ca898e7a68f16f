#include "slot_store.h"

#include "check.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

using pye::SlotStore;
using State = SlotStore::State;

namespace {

constexpr uint32_t kNone     = SlotStore::kNone;
constexpr float    kInfinity = std::numeric_limits<float>::infinity();
constexpr float    kNan      = std::numeric_limits<float>::quiet_NaN();

struct Claim {
    uint32_t slot, evicted;
};

Claim claim(SlotStore & store, uint32_t expert) {
    Claim c{kNone, 12345};
    c.slot = store.claim(expert, &c.evicted);
    store.check();
    return c;
}

// Makes an expert resident and unpinned; returns its slot.
uint32_t load(SlotStore & store, uint32_t expert) {
    const Claim c = claim(store, expert);
    CHECK(c.slot != kNone);
    store.landed(c.slot);
    store.unpin(c.slot);
    store.check();
    return c.slot;
}

// A store of as many experts, of which 0, 1, ... are resident in this order of age.
SlotStore full_store(uint32_t n_expert, uint32_t n_slot) {
    SlotStore store(n_expert);
    store.resize(n_slot);
    for (uint32_t e = 0; e < n_slot; ++e) {
        load(store, e);
    }
    CHECK_EQUAL(store.n_resident(), n_slot);
    return store;
}

// The expert that has to leave for `expert`, which becomes resident.
uint32_t victim_for(SlotStore & store, uint32_t expert) {
    const Claim c = claim(store, expert);
    CHECK(c.slot != kNone);
    store.landed(c.slot);
    store.unpin(c.slot);
    return c.evicted;
}

} // namespace

TEST(a_new_store_has_no_slots) {
    SlotStore store(3);
    store.check();
    CHECK_EQUAL(store.n_slot(), 0u);
    CHECK_EQUAL(store.n_resident(), 0u);
    for (uint32_t i = 0; i < 3; ++i) {
        CHECK(store.state(i) == State::Retired);
        CHECK_EQUAL(store.expert_in(i), kNone);
        CHECK_EQUAL(store.slot_of(i), kNone);
        CHECK(!store.ready(i));
    }
    const Claim c = claim(store, 0);
    CHECK_EQUAL(c.slot, kNone);
    CHECK_EQUAL(c.evicted, kNone);
    CHECK_EQUAL(store.slot_of(0), kNone);
}

TEST(a_store_of_no_experts) {
    SlotStore store(0);
    CHECK(store.resize(5).empty());
    CHECK_EQUAL(store.n_slot(), 0u);
    store.set_priorities({});
    store.check();
}

TEST(empty_then_loading_then_ready) {
    SlotStore store(4);
    CHECK(store.resize(2).empty());
    CHECK_EQUAL(store.n_slot(), 2u);
    const Claim c = claim(store, 3);
    CHECK(c.slot != kNone);
    CHECK_EQUAL(c.evicted, kNone);
    CHECK(store.state(c.slot) == State::Loading);
    CHECK_EQUAL(store.slot_of(3), c.slot);
    CHECK_EQUAL(store.expert_in(c.slot), 3u);
    CHECK(!store.ready(3)); // not before every byte has landed
    CHECK_EQUAL(store.n_resident(), 0u);

    store.landed(c.slot);
    store.check();
    CHECK(store.state(c.slot) == State::Ready);
    CHECK(store.ready(3));
    CHECK_EQUAL(store.n_resident(), 1u);
}

TEST(a_failed_load_empties_the_slot) {
    SlotStore store(4);
    store.resize(1);
    const Claim c = claim(store, 2);
    store.failed(c.slot);
    store.check();
    CHECK(store.state(c.slot) == State::Empty);
    CHECK_EQUAL(store.expert_in(c.slot), kNone);
    CHECK_EQUAL(store.slot_of(2), kNone);
    CHECK_EQUAL(store.n_resident(), 0u);
    CHECK_EQUAL(store.n_slot(), 1u);
    // The slot serves again, for the same expert or another.
    CHECK_EQUAL(claim(store, 2).slot, c.slot);
    store.failed(c.slot);
    CHECK_EQUAL(claim(store, 1).slot, c.slot);
}

TEST(a_failed_load_that_evicted_leaves_an_empty_slot) {
    SlotStore   store = full_store(3, 1);
    const Claim c     = claim(store, 1);
    CHECK_EQUAL(c.evicted, 0u);
    store.failed(c.slot);
    CHECK(!store.ready(0));
    CHECK(!store.ready(1));
    const Claim again = claim(store, 2);
    CHECK_EQUAL(again.evicted, kNone);
    CHECK_EQUAL(again.slot, c.slot);
}

TEST(wrong_transitions_are_refused) {
    SlotStore store(3);
    store.resize(2);
    uint32_t evicted = kNone;
    CAUGHT(std::logic_error, store.landed(0));
    CAUGHT(std::logic_error, store.failed(0));
    CAUGHT(std::logic_error, store.unpin(0));
    const uint32_t slot = claim(store, 0).slot;
    CAUGHT(std::logic_error, store.claim(0, &evicted)); // loading: it has a slot
    CAUGHT(std::logic_error, store.unpin(slot));
    store.landed(slot);
    CAUGHT(std::logic_error, store.claim(0, &evicted)); // ready: it has a slot
    CAUGHT(std::logic_error, store.landed(slot));
    CAUGHT(std::logic_error, store.failed(slot));
    store.unpin(slot);
    CAUGHT(std::logic_error, store.unpin(slot));
    store.resize(0);
    CAUGHT(std::logic_error, store.landed(slot));
    CAUGHT(std::logic_error, store.set_priorities({1, 2}));
    CAUGHT(std::logic_error, store.set_priorities({1, 2, 3, 4}));
    store.check();
}

TEST(with_a_slot_for_every_expert_each_has_its_own_place) {
    SlotStore store(5);
    store.resize(5);
    for (const uint32_t e : {4u, 0u, 2u, 3u, 1u}) {
        CHECK_EQUAL(load(store, e), e);
    }
}

TEST(empty_slots_are_used_before_anything_is_evicted) {
    SlotStore store(8);
    store.resize(4);
    for (const uint32_t e : {7u, 6u, 5u, 4u}) {
        const Claim c = claim(store, e);
        CHECK(c.slot < 8);
        CHECK_EQUAL(c.evicted, kNone);
        store.landed(c.slot);
        store.unpin(c.slot);
    }
    CHECK_EQUAL(claim(store, 0).evicted, 7u);
}

TEST(the_victim_of_equal_priorities_is_the_least_recently_used) {
    SlotStore store = full_store(8, 4);
    store.touch(store.slot_of(0));
    store.touch(store.slot_of(2));
    CHECK_EQUAL(victim_for(store, 4), 1u);
    CHECK_EQUAL(victim_for(store, 5), 3u);
    CHECK_EQUAL(victim_for(store, 6), 0u);
    CHECK_EQUAL(victim_for(store, 7), 2u);
    CHECK_EQUAL(victim_for(store, 0), 4u); // loading counts as a use
}

TEST(the_victim_has_the_lowest_priority_whatever_its_age) {
    SlotStore store = full_store(8, 4);
    store.set_priorities({0.5f, -3.0f, 0.25f, -3.0f, 9, 9, 9, 9});
    store.touch(store.slot_of(1)); // of 1 and 3, 3 is now the older one
    CHECK_EQUAL(victim_for(store, 4), 3u);
    CHECK_EQUAL(victim_for(store, 5), 1u);
    CHECK_EQUAL(victim_for(store, 6), 2u);
    CHECK_EQUAL(victim_for(store, 7), 0u);
}

TEST(priorities_count_at_the_moment_of_eviction) {
    SlotStore store = full_store(4, 2);
    store.set_priorities({1, 2, 0, 0});
    store.set_priorities({2, 1, 0, 0});
    CHECK_EQUAL(victim_for(store, 2), 1u);
    CHECK_EQUAL(victim_for(store, 3), 2u); // one that just came goes first if its priority says so
}

TEST(positive_infinity_outlives_everything_finite) {
    SlotStore store = full_store(6, 3);
    store.set_priorities({kInfinity, std::numeric_limits<float>::max(), 0, 0, 0, 0});
    for (uint32_t round = 0; round < 10; ++round) {
        store.touch(store.slot_of(1));
        CHECK_EQUAL(victim_for(store, 3 + round % 3), round == 0 ? 2 : 3 + (round + 2) % 3);
    }
    CHECK(store.ready(0));
    CHECK(store.ready(1));
}

TEST(a_store_full_of_infinite_priorities_still_finds_a_victim) {
    SlotStore store = full_store(4, 2);
    store.set_priorities({kInfinity, kInfinity, kInfinity, kInfinity});
    CHECK_EQUAL(victim_for(store, 2), 0u);
    CHECK_EQUAL(victim_for(store, 3), 1u);
    store.set_priorities({-kInfinity, -kInfinity, -kInfinity, -kInfinity});
    CHECK_EQUAL(victim_for(store, 0), 2u);
}

TEST(negative_infinity_goes_first) {
    SlotStore store = full_store(4, 3);
    store.set_priorities({-std::numeric_limits<float>::max(), 0, -kInfinity, 0});
    CHECK_EQUAL(victim_for(store, 3), 2u);
    CHECK_EQUAL(victim_for(store, 2), 0u);
}

TEST(nan_counts_as_zero) {
    SlotStore store = full_store(8, 4);
    store.set_priorities({1, kNan, 0, -kNan, 9, 9, 9, -1});
    CHECK_EQUAL(victim_for(store, 4), 1u); // 1, 2 and 3 are equal: the oldest
    CHECK_EQUAL(victim_for(store, 5), 2u);
    CHECK_EQUAL(victim_for(store, 7), 3u);
    CHECK_EQUAL(victim_for(store, 6), 7u);
    CHECK_EQUAL(victim_for(store, 1), 0u);
    // Below zero goes before NaN, though NaN is older.
    SlotStore other = full_store(3, 2);
    other.set_priorities({kNan, -0.5f, 0});
    CHECK_EQUAL(victim_for(other, 2), 1u);
}

TEST(both_zeros_are_equal) {
    SlotStore store = full_store(3, 2);
    store.set_priorities({0.0f, -0.0f, 0.0f});
    CHECK_EQUAL(victim_for(store, 2), 0u);
}

TEST(a_pinned_slot_is_never_a_victim) {
    SlotStore store = full_store(4, 2);
    store.set_priorities({-kInfinity, 5, 0, 0});
    store.pin(store.slot_of(0));
    CHECK_EQUAL(claim(store, 2).evicted, 1u); // 2 is loading now
    CHECK_EQUAL(claim(store, 3).slot, kNone); // one is pinned, the other loading
    CHECK(store.ready(0));
}

TEST(pins_count) {
    SlotStore      store = full_store(3, 1);
    const uint32_t slot  = store.slot_of(0);
    store.pin(slot);
    store.pin(slot);
    store.unpin(slot);
    const Claim refused = claim(store, 1);
    CHECK_EQUAL(refused.slot, kNone);
    CHECK_EQUAL(refused.evicted, kNone);
    CHECK(store.ready(0));
    CHECK_EQUAL(store.slot_of(1), kNone);
    store.unpin(slot);
    CHECK_EQUAL(claim(store, 1).evicted, 0u);
}

TEST(what_has_landed_is_pinned) {
    SlotStore   store = full_store(3, 1);
    const Claim c     = claim(store, 1);
    store.landed(c.slot);
    CHECK_EQUAL(claim(store, 2).slot, kNone);
    store.unpin(c.slot);
    CHECK_EQUAL(claim(store, 2).evicted, 1u);
}

TEST(a_loading_slot_is_never_a_victim) {
    SlotStore store(3);
    store.resize(1);
    const Claim c = claim(store, 0);
    store.set_priorities({-kInfinity, 0, 0});
    const Claim refused = claim(store, 1);
    CHECK_EQUAL(refused.slot, kNone);
    CHECK_EQUAL(refused.evicted, kNone);
    CHECK(store.state(c.slot) == State::Loading);
    CHECK_EQUAL(store.slot_of(0), c.slot);
}

TEST(growing_adds_empty_slots_and_keeps_what_is_there) {
    SlotStore store = full_store(6, 2);
    CHECK(store.resize(4).empty());
    store.check();
    CHECK_EQUAL(store.n_slot(), 4u);
    CHECK_EQUAL(store.n_resident(), 2u);
    CHECK_EQUAL(claim(store, 4).evicted, kNone);
    CHECK_EQUAL(claim(store, 5).evicted, kNone);
    CHECK(store.ready(0));
    CHECK(store.ready(1));
}

TEST(there_are_never_more_slots_than_experts) {
    SlotStore store(3);
    store.resize(1000);
    store.check();
    CHECK_EQUAL(store.n_slot(), 3u);
    store.resize(UINT32_MAX);
    CHECK_EQUAL(store.n_slot(), 3u);
}

TEST(shrinking_gives_up_empty_slots_first) {
    SlotStore store(6);
    store.resize(5);
    load(store, 2);
    load(store, 4);
    const std::vector<uint32_t> left = store.resize(2);
    store.check();
    CHECK_EQUAL(left.size(), 3u);
    CHECK(store.ready(2));
    CHECK(store.ready(4));
    for (const uint32_t slot : left) {
        CHECK(store.state(slot) == State::Retired);
        CHECK_EQUAL(store.expert_in(slot), kNone);
    }
}

TEST(shrinking_evicts_by_priority_then_age) {
    SlotStore store = full_store(6, 5);
    store.set_priorities({3, 1, 2, 1, kInfinity, 0});
    store.touch(store.slot_of(1));
    const uint32_t              of_1 = store.slot_of(1), of_3 = store.slot_of(3);
    const std::vector<uint32_t> left = store.resize(3);
    store.check();
    CHECK(left == (std::vector<uint32_t>{of_3, of_1}));
    CHECK(store.ready(0));
    CHECK(store.ready(2));
    CHECK(store.ready(4));
    CHECK_EQUAL(store.n_resident(), 3u);
}

TEST(retired_slots_are_not_used_until_they_return) {
    SlotStore                   store = full_store(4, 4);
    const std::vector<uint32_t> left  = store.resize(1);
    CHECK_EQUAL(left.size(), 3u);
    CHECK(store.ready(3));
    const Claim c = claim(store, 0);
    CHECK_EQUAL(c.evicted, 3u);
    CHECK(std::find(left.begin(), left.end(), c.slot) == left.end());
    CHECK_EQUAL(claim(store, 1).slot, kNone);
    CHECK(store.resize(2).empty());
    const Claim other = claim(store, 1);
    CHECK_EQUAL(other.evicted, kNone);
    CHECK(std::find(left.begin(), left.end(), other.slot) != left.end());
}

TEST(shrinking_leaves_pinned_and_loading_slots) {
    SlotStore      store  = full_store(6, 3);
    const uint32_t pinned = store.slot_of(0);
    store.pin(pinned);
    const Claim claimed = claim(store, 4);
    CHECK_EQUAL(claimed.evicted, 1u);
    const uint32_t under_way = claimed.slot;

    const std::vector<uint32_t> left = store.resize(0);
    store.check();
    CHECK_EQUAL(left.size(), 1u);
    CHECK_EQUAL(store.n_slot(), 2u); // short of the wish
    CHECK(store.ready(0));
    CHECK(store.state(under_way) == State::Loading);

    // The load lands as if nothing had happened; the wish comes true when it is made again.
    store.landed(under_way);
    CHECK(store.resize(0).empty());
    store.unpin(under_way);
    CHECK(store.resize(0) == std::vector<uint32_t>{under_way});
    CHECK_EQUAL(store.n_slot(), 1u);
    store.unpin(pinned);
    CHECK(store.resize(0) == std::vector<uint32_t>{pinned});
    CHECK_EQUAL(store.n_slot(), 0u);
    CHECK_EQUAL(store.n_resident(), 0u);
    store.check();
}

TEST(growing_while_pinned_and_loading) {
    SlotStore      store   = full_store(6, 2);
    const uint32_t pinned  = store.slot_of(1);
    const uint32_t loading = claim(store, 4).slot;
    store.pin(pinned);
    CHECK(store.resize(3).empty());
    CHECK_EQUAL(store.n_slot(), 3u);
    CHECK(store.state(loading) == State::Loading);
    CHECK(store.ready(1));
    const Claim c = claim(store, 5);
    CHECK_EQUAL(c.evicted, kNone);
    store.landed(loading);
    CHECK_EQUAL(store.expert_in(loading), 4u);
    store.check();
}

TEST(an_expected_expert_is_the_last_victim) {
    SlotStore store = full_store(6, 3);
    store.expect(0);
    store.expect(1);
    CHECK_EQUAL(victim_for(store, 3), 2u); // not the oldest, but nobody expects it
    CHECK_EQUAL(victim_for(store, 4), 3u);
    store.expect(4);
    CHECK_EQUAL(victim_for(store, 5), 0u); // a demand load must succeed
    store.forget_expected(0, 6);
    CHECK_EQUAL(victim_for(store, 0), 1u);
}

TEST(forgetting_is_for_a_range) {
    SlotStore store = full_store(6, 3);
    for (uint32_t e = 0; e < 3; ++e) {
        store.expect(e);
    }
    store.forget_expected(1, 1);
    CHECK_EQUAL(victim_for(store, 3), 1u);
    CHECK_EQUAL(victim_for(store, 4), 3u);
}

TEST(a_prefetch_takes_an_empty_slot_or_an_unexpected_victim) {
    SlotStore store(6);
    store.resize(2);
    uint32_t evicted = 12345;
    uint32_t slot    = store.claim_for_prefetch(4, false, &evicted);
    CHECK(slot != kNone);
    CHECK_EQUAL(evicted, kNone);
    store.landed(slot);
    store.unpin(slot);
    load(store, 5);
    CHECK_EQUAL(store.claim_for_prefetch(0, false, &evicted), kNone); // no empty slot is left
    store.expect(4);
    slot = store.claim_for_prefetch(0, true, &evicted);
    CHECK_EQUAL(evicted, 5u);
    CHECK(store.state(slot) == State::Loading);
    CHECK_EQUAL(store.claim_for_prefetch(1, true, &evicted), kNone); // one is expected, one is being filled
    CHECK_EQUAL(evicted, kNone);
    store.check();
    (void)CAUGHT(std::logic_error, store.claim_for_prefetch(0, true, &evicted));
}

TEST(a_prefetch_never_pushes_out_what_an_infinite_priority_keeps) {
    SlotStore store = full_store(4, 2);
    store.set_priorities({kInfinity, kInfinity, 0, 0});
    uint32_t evicted = 12345;
    CHECK_EQUAL(store.claim_for_prefetch(2, true, &evicted), kNone);
    store.set_priorities({kInfinity, 3e38f, 0, 0});
    CHECK(store.claim_for_prefetch(2, true, &evicted) != kNone);
    CHECK_EQUAL(evicted, 1u);
}

TEST(the_latest_that_passes_on_is_the_first_victim) {
    SlotStore store = full_store(8, 4);
    for (uint32_t e : {1u, 2u, 3u}) {
        store.pass_on(store.slot_of(e));
    }
    store.touch(store.slot_of(3)); // wanted again: it stays
    CHECK_EQUAL(claim(store, 4).evicted, 2u);
    CHECK_EQUAL(claim(store, 5).evicted, 1u);
    CHECK_EQUAL(claim(store, 6).evicted, 0u); // now by age
}

TEST(who_comes_by_worth_takes_what_is_spare_then_what_is_worth_no_more) {
    SlotStore store = full_store(8, 4); // experts 0 to 3
    store.set_priorities({1, 2, 3, 4, 2, 2, 9, 0});
    uint32_t evicted = 12345;
    store.expect(0);
    store.expect(3);
    store.landed(store.claim_by_worth(4, &evicted));
    CHECK_EQUAL(evicted, 2u); // of 1 and 2, which are spare, the one that is kept longer elsewhere
    store.expect(4);
    store.expect(1);
    store.unpin(store.slot_of(4));
    CHECK_EQUAL(store.claim_by_worth(7, &evicted), kNone); // all are worth more
    CHECK_EQUAL(evicted, kNone);
    store.failed(store.claim_by_worth(5, &evicted));
    CHECK_EQUAL(evicted, 0u);
    CHECK(store.has_empty());
    CHECK(store.claim_by_worth(7, &evicted) != kNone);
    CHECK(!store.has_empty());
    store.check();
}

TEST(it_is_known_whether_the_victim_was_to_pass_on) {
    SlotStore store = full_store(6, 2);
    store.pass_on(store.slot_of(1));
    (void)claim(store, 2);
    CHECK(store.victim_passed());
    (void)claim(store, 3);
    CHECK(!store.victim_passed());
}
