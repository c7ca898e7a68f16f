// The slot store against a model that is too simple to be wrong: maps, and a sorted list where the store is clever. What
// the store leaves open (which of several empty slots) the model takes from the store; everything else it foresees.
#include "slot_store.h"

#include "check.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <random>
#include <set>
#include <stdexcept>
#include <tuple>

using pye::SlotStore;
using State = SlotStore::State;

namespace {

constexpr uint32_t kNone = SlotStore::kNone;

class Model {
  public:
    struct Occupant {
        uint32_t slot;
        bool     loading;
        uint32_t pins;
        uint64_t used;
    };

    explicit Model(uint32_t n_expert) : n_expert_(n_expert), priority_(n_expert, 0.0) {
        for (uint32_t s = 0; s < n_expert; ++s) {
            retired_.insert(s);
        }
    }

    // Experts that may leave, in the order in which they do.
    std::vector<uint32_t> candidates() const {
        std::vector<std::tuple<double, uint64_t, uint32_t>> order;
        for (const auto & [expert, o] : here_) {
            if (!o.loading && o.pins == 0) {
                order.emplace_back(priority_[expert], o.used, expert);
            }
        }
        std::sort(order.begin(), order.end());
        std::vector<uint32_t> experts;
        for (const auto & o : order) {
            experts.push_back(std::get<2>(o));
        }
        return experts;
    }

    void claimed(uint32_t expert, uint32_t slot, uint32_t evicted) {
        if (empty_.empty()) {
            const std::vector<uint32_t> order = candidates();
            if (order.empty()) {
                CHECK_EQUAL(slot, kNone);
                CHECK_EQUAL(evicted, kNone);
                return;
            }
            CHECK_EQUAL(evicted, order[0]);
            CHECK_EQUAL(slot, here_.at(evicted).slot);
            here_.erase(evicted);
        } else {
            CHECK_EQUAL(evicted, kNone);
            CHECK(empty_.count(slot) == 1);
            if (empty_.count(expert) == 1) {
                CHECK_EQUAL(slot, expert); // its own place
            }
            empty_.erase(slot);
        }
        here_[expert] = {slot, true, 0, ++clock_};
    }

    void landed(uint32_t expert) {
        here_.at(expert).loading = false;
        here_.at(expert).pins    = 1;
    }
    void failed(uint32_t expert) {
        empty_.insert(here_.at(expert).slot);
        here_.erase(expert);
    }
    void touch(uint32_t expert) { here_.at(expert).used = ++clock_; }
    void prioritise(const std::vector<float> & values) {
        for (uint32_t e = 0; e < n_expert_; ++e) {
            priority_[e] = std::isnan(values[e]) ? 0.0 : static_cast<double>(values[e]);
        }
    }

    // `left` are the slots that the store says have left.
    void resized(uint32_t wish, const std::vector<uint32_t> & left, const SlotStore & store) {
        wish = std::min(wish, n_expert_);
        if (wish >= n_slot()) {
            CHECK(left.empty());
            for (auto s = retired_.begin(); s != retired_.end();) {
                if (store.state(*s) == State::Empty) {
                    empty_.insert(*s);
                    s = retired_.erase(s);
                } else {
                    ++s;
                }
            }
            CHECK_EQUAL(n_slot(), wish);
            return;
        }
        const size_t                surplus = n_slot() - wish;
        const std::vector<uint32_t> order   = candidates();
        const size_t                n_empty = std::min(surplus, empty_.size());
        const size_t                n_full  = std::min(surplus - n_empty, order.size());
        CHECK_EQUAL(left.size(), n_empty + n_full);
        for (size_t i = 0; i < left.size(); ++i) {
            if (i < n_empty) {
                CHECK(empty_.erase(left[i]) == 1);
            } else {
                const auto victim = here_.find(order[i - n_empty]);
                CHECK_EQUAL(left[i], victim->second.slot);
                here_.erase(victim);
            }
            retired_.insert(left[i]);
        }
    }

    void compare(const SlotStore & store) const {
        uint32_t n_ready = 0;
        for (uint32_t e = 0; e < n_expert_; ++e) {
            const auto found = here_.find(e);
            const bool ready = found != here_.end() && !found->second.loading;
            n_ready += ready;
            CHECK_EQUAL(store.slot_of(e), found == here_.end() ? kNone : found->second.slot);
            CHECK_EQUAL(store.ready(e), ready);
            if (found != here_.end()) {
                CHECK_EQUAL(store.expert_in(found->second.slot), e);
                CHECK(store.state(found->second.slot) == (ready ? State::Ready : State::Loading));
            }
        }
        for (const uint32_t s : empty_) {
            CHECK(store.state(s) == State::Empty);
            CHECK_EQUAL(store.expert_in(s), kNone);
        }
        for (const uint32_t s : retired_) {
            CHECK(store.state(s) == State::Retired);
            CHECK_EQUAL(store.expert_in(s), kNone);
        }
        CHECK_EQUAL(here_.size() + empty_.size() + retired_.size(), n_expert_);
        CHECK_EQUAL(store.n_slot(), n_slot());
        CHECK_EQUAL(store.n_resident(), n_ready);
    }

    uint32_t n_slot() const { return static_cast<uint32_t>(here_.size() + empty_.size()); }

    std::map<uint32_t, Occupant> here_; // by expert

  private:
    uint32_t            n_expert_;
    std::vector<double> priority_;
    std::set<uint32_t>  empty_, retired_; // slots
    uint64_t            clock_ = 0;
};

class Workload {
  public:
    explicit Workload(uint32_t seed)
        : random_(seed), n_expert_(1 + random_() % 24), store_(n_expert_), model_(n_expert_) {}

    void step() {
        switch (random_() % 16) {
            case 0:
            case 1:
            case 2:
            case 3:
            case 4: claim(); break;
            case 5:
            case 6:
            case 7: land(); break;
            case 8: fail(); break;
            case 9:
            case 10: touch(); break;
            case 11: pin(); break;
            case 12:
            case 13: unpin(); break;
            case 14: prioritise(); break;
            default: resize(); break;
        }
        store_.check();
        model_.compare(store_);
    }

    uint64_t evictions = 0, refusals = 0, failures = 0, short_resizes = 0;

  private:
    uint32_t below(uint32_t n) { return static_cast<uint32_t>(random_() % n); }

    // Some expert that has a slot, loading or ready as asked; kNone if there is none.
    uint32_t some(bool loading) {
        std::vector<uint32_t> experts;
        for (const auto & [expert, o] : model_.here_) {
            if (o.loading == loading) {
                experts.push_back(expert);
            }
        }
        return experts.empty() ? kNone : experts[below(static_cast<uint32_t>(experts.size()))];
    }

    void claim() {
        const uint32_t expert  = below(n_expert_);
        uint32_t       evicted = 12345;
        if (model_.here_.count(expert) == 1) {
            CAUGHT(std::logic_error, store_.claim(expert, &evicted));
            return;
        }
        const uint32_t slot = store_.claim(expert, &evicted);
        model_.claimed(expert, slot, evicted);
        evictions += evicted != kNone;
        refusals += slot == kNone;
    }
    void land() {
        const uint32_t expert = some(true);
        if (expert != kNone) {
            store_.landed(store_.slot_of(expert));
            model_.landed(expert);
        }
    }
    void fail() {
        const uint32_t expert = some(true);
        if (expert != kNone) {
            store_.failed(store_.slot_of(expert));
            model_.failed(expert);
            ++failures;
        }
    }
    void touch() {
        const uint32_t expert = some(false);
        if (expert != kNone) {
            store_.touch(store_.slot_of(expert));
            model_.touch(expert);
        }
    }
    void pin() {
        const uint32_t expert = some(false);
        if (expert != kNone) {
            store_.pin(store_.slot_of(expert));
            ++model_.here_.at(expert).pins;
        }
    }
    void unpin() {
        const uint32_t expert = some(false);
        if (expert == kNone) {
            return;
        }
        if (model_.here_.at(expert).pins == 0) {
            CAUGHT(std::logic_error, store_.unpin(store_.slot_of(expert)));
        } else {
            store_.unpin(store_.slot_of(expert));
            --model_.here_.at(expert).pins;
        }
    }
    void prioritise() {
        constexpr float    infinity = std::numeric_limits<float>::infinity();
        const float        odd[]    = {infinity, -infinity, std::numeric_limits<float>::quiet_NaN(), 0.0f, -0.0f};
        std::vector<float> values(n_expert_);
        for (float & v : values) {
            // Few different values, so that age decides often.
            v = below(4) == 0 ? odd[below(5)] : static_cast<float>(below(7)) / 2 - 1;
        }
        store_.set_priorities(values);
        model_.prioritise(values);
    }
    void resize() {
        const uint32_t              wish = below(n_expert_ + 3);
        const std::vector<uint32_t> left = store_.resize(wish);
        model_.resized(wish, left, store_);
        short_resizes += store_.n_slot() > wish;
    }

    std::mt19937 random_;
    uint32_t     n_expert_;
    SlotStore    store_;
    Model        model_;
};

} // namespace

TEST(random_workloads_agree_with_the_model) {
    constexpr uint32_t n_seed = 200, n_step = 1000;
    uint64_t           evictions = 0, refusals = 0, failures = 0, short_resizes = 0;
    for (uint32_t seed = 1; seed <= n_seed; ++seed) {
        Workload workload(seed);
        for (uint32_t i = 0; i < n_step; ++i) {
            try {
                workload.step();
            } catch (const std::exception & e) {
                throw check::Failed("seed " + std::to_string(seed) + ", step " + std::to_string(i) + ": " + e.what());
            }
        }
        evictions += workload.evictions;
        refusals += workload.refusals;
        failures += workload.failures;
        short_resizes += workload.short_resizes;
    }
    // The workload must reach the corners, or agreement means little.
    CHECK(evictions > n_seed);
    CHECK(refusals > n_seed);
    CHECK(failures > n_seed);
    CHECK(short_resizes > n_seed);
}
