#include "event_ring.h"

#include "check.h"

#include <deque>
#include <random>

using pye::EventRing;

namespace {

pye_event event(uint32_t number) {
    return {number, static_cast<uint16_t>(number % 7), static_cast<uint16_t>(number % 11), PYE_EVENT_MISS,
            static_cast<uint16_t>(number % 13)};
}

std::vector<uint32_t> take(EventRing & ring, size_t capacity) {
    std::vector<pye_event> out(capacity + 1, event(UINT32_MAX));
    const size_t           n = ring.take(out.data(), capacity);
    CHECK(n <= capacity);
    CHECK_EQUAL(out[n].step, UINT32_MAX); // nothing is written past the events it says it took
    std::vector<uint32_t> numbers;
    for (size_t i = 0; i < n; ++i) {
        const pye_event as_pushed = event(out[i].step);
        CHECK_EQUAL(out[i].layer, as_pushed.layer);
        CHECK_EQUAL(out[i].expert, as_pushed.expert);
        CHECK_EQUAL(out[i].kind, as_pushed.kind);
        CHECK_EQUAL(out[i].tokens, as_pushed.tokens);
        numbers.push_back(out[i].step);
    }
    return numbers;
}

} // namespace

TEST(an_empty_ring_gives_nothing) {
    EventRing ring(4);
    CHECK(take(ring, 10).empty());
    CHECK(take(ring, 0).empty());
    CHECK_EQUAL(ring.lost(), 0u);
}

TEST(events_come_out_in_the_order_they_went_in) {
    EventRing ring(4);
    for (uint32_t i = 0; i < 4; ++i) {
        ring.push(event(i));
    }
    CHECK(take(ring, 2) == (std::vector<uint32_t>{0, 1}));
    ring.push(event(4));
    CHECK(take(ring, 10) == (std::vector<uint32_t>{2, 3, 4}));
    CHECK(take(ring, 10).empty());
    CHECK_EQUAL(ring.lost(), 0u);
}

TEST(a_full_ring_overwrites_the_oldest_and_counts_them) {
    EventRing ring(3);
    for (uint32_t i = 0; i < 8; ++i) {
        ring.push(event(i));
        CHECK_EQUAL(ring.lost(), i < 3 ? 0 : i - 2);
    }
    CHECK(take(ring, 2) == (std::vector<uint32_t>{5, 6}));
    ring.push(event(8));
    CHECK_EQUAL(ring.lost(), 5u); // taken events are not lost ones
    CHECK(take(ring, 3) == (std::vector<uint32_t>{7, 8}));
}

TEST(a_ring_of_one) {
    EventRing ring(1);
    ring.push(event(1));
    ring.push(event(2));
    CHECK(take(ring, 5) == std::vector<uint32_t>{2});
    CHECK_EQUAL(ring.lost(), 1u);
    ring.push(event(3));
    CHECK(take(ring, 5) == std::vector<uint32_t>{3});
}

TEST(random_pushes_and_takes_behave_as_a_queue_that_forgets) {
    std::mt19937 random(1);
    for (const size_t capacity : {1, 2, 5, 64}) {
        EventRing            ring(capacity);
        std::deque<uint32_t> model;
        uint64_t             lost = 0;
        for (uint32_t i = 0; i < 20000; ++i) {
            if (random() % 3 != 0) {
                ring.push(event(i));
                model.push_back(i);
                if (model.size() > capacity) {
                    model.pop_front();
                    ++lost;
                }
            } else {
                const size_t                wish  = random() % (capacity + 2);
                const std::vector<uint32_t> taken = take(ring, wish);
                CHECK_EQUAL(taken.size(), std::min(wish, model.size()));
                for (const uint32_t number : taken) {
                    CHECK_EQUAL(number, model.front());
                    model.pop_front();
                }
            }
            CHECK_EQUAL(ring.lost(), lost);
        }
        CHECK(take(ring, capacity) == std::vector<uint32_t>(model.begin(), model.end()));
    }
}
