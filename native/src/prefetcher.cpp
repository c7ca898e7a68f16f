#include "prefetcher.h"

#include "elapsed.h"
#include "layer_step.h"

#include <algorithm>
#include <chrono>

namespace pye {

namespace {

constexpr float kFading      = 0.98f; // of a rank's record with every guess; about the last fifty count
constexpr float kPrior       = 8.0f;  // guesses' worth of belief before there are any
constexpr float kPriorChance = 0.5f;
constexpr float kMostRoom    = 16.0f;

} // namespace

float Prefetcher::Record::chance(uint32_t rank) const {
    const float n = rank < tried.size() ? tried[rank] : 0.0f;
    const float r = rank < right.size() ? right[rank] : 0.0f;
    const float p = rank < prior.size() ? prior[rank] : kPriorChance;
    return (r + kPrior * p) / (n + kPrior);
}

void Prefetcher::Record::add(uint32_t rank, bool was_right) {
    if (rank >= tried.size()) {
        tried.resize(rank + 1, 0.0f);
        right.resize(rank + 1, 0.0f);
    }
    tried[rank] = kFading * tried[rank] + 1.0f;
    right[rank] = kFading * right[rank] + (was_right ? 1.0f : 0.0f);
}

Prefetcher::Prefetcher(const ExpertIndex & index, std::vector<SlotStore *> stores, ExpertSource & source,
                       EventRing & events, pye_stats & stats)
    : index_(index), stores_(std::move(stores)), source_(source), events_(events), stats_(stats), rules_(), records_(1),
      pending_(1) {
    rules_.least_chance  = 0.4f;
    rules_.replay_recall = -1.0f;
    for (const ShapeClass & c : index_.classes) {
        unused_.emplace_back(c.n_expert, 0);
    }
}

void Prefetcher::set_predictors(std::vector<Predictor> predictors) {
    predictors_ = std::move(predictors);
    records_.assign(predictors_.size() + 1, {});
    for (size_t p = 0; p < predictors_.size(); ++p) {
        records_[p].prior = predictors_[p].chances;
    }
    pending_.assign(predictors_.size() + 1, {});
}

void Prefetcher::set_rules(const pye_prefetch_rules & rules) { rules_ = rules; }

void Prefetcher::settle() {
    DiskTier::Landed one;
    while (!loads_.empty() && source_.disk().load_poll(&one)) {
        landed(one);
    }
}

bool Prefetcher::landed(const DiskTier::Landed & landed) {
    const uint32_t shape_class = ExpertSource::class_of(landed), slot = ExpertSource::slot_of(landed);
    const auto     load = std::find_if(loads_.begin(), loads_.end(),
                                       [&](const Load & l) { return l.shape_class == shape_class && l.slot == slot; });
    if (load == loads_.end()) {
        return false;
    }
    SlotStore & store = *stores_[shape_class];
    if (landed.ok) {
        store.landed(slot);
        store.unpin(slot);
        unused_[shape_class][slot] = 1;
    } else {
        store.failed(slot);
        ++(landed.cancelled ? stats_.prefetches_wasted : stats_.prefetches_failed);
    }
    loads_.erase(load);
    return true;
}

void Prefetcher::spoken(uint32_t layer, const std::vector<Wanted> & wanted) {
    judge(layer, wanted);
    uint32_t n_begun = 0, n_unread = 0;
    for (Load & load : loads_) {
        const bool is_wanted = load.layer == layer && std::any_of(wanted.begin(), wanted.end(), [&](const Wanted & w) {
                                   return w.expert == load.expert;
                               });
        if (load.layer == layer && !load.keep) {
            ++n_begun;
            n_unread += source_.unread(load.layer, load.slot) > 0;
        }
        if (load.layer == layer && !is_wanted && !load.keep) {
            give_up(load);
        }
    }
    // Fate caps by measured overlap; here the overlap is found by trying: a little more while all arrive, less when not.
    if (n_unread > 0) {
        room_ = std::max(1.0f, 0.9f * room_);
    } else if (n_begun > 0 && static_cast<float>(n_begun) + 1.0f > room_) {
        room_ = std::min(kMostRoom, room_ + 0.25f);
    }
    store_of(layer).forget_expected(index_.layers[layer].first, index_.layers[layer].n_expert);
}

// What became of the guesses about a layer.
void Prefetcher::judge(uint32_t layer, const std::vector<Wanted> & wanted) {
    for (size_t p = 0; p < pending_.size(); ++p) {
        const bool about = p < predictors_.size() ? predictors_[p].target == layer : replayed_for_ == layer;
        if (!about) {
            continue;
        }
        for (const Guess & g : pending_[p]) {
            const bool right =
                std::any_of(wanted.begin(), wanted.end(), [&](const Wanted & w) { return w.expert == g.expert; });
            records_[p].add(g.rank, right);
            ++stats_.guesses;
            stats_.guesses_right += right;
        }
        pending_[p].clear();
    }
}

void Prefetcher::used(uint32_t layer, uint32_t expert) {
    const uint32_t shape_class = index_.layers[layer].shape_class;
    uint8_t &      unused      = unused_[shape_class][store_of(layer).slot_of(dense(layer, expert))];
    stats_.prefetch_hits += unused;
    unused = 0;
}

void Prefetcher::evicted(uint32_t shape_class, uint32_t slot) {
    stats_.prefetches_wasted += unused_[shape_class][slot];
    unused_[shape_class][slot] = 0;
}

bool Prefetcher::adopt(uint32_t layer, uint32_t expert) {
    const auto load = std::find_if(loads_.begin(), loads_.end(),
                                   [&](const Load & l) { return l.layer == layer && l.expert == expert; });
    if (load == loads_.end() || load->given_up) {
        return false;
    }
    source_.promote(layer, load->slot);
    loads_.erase(load);
    ++stats_.prefetches_late;
    return true;
}

void Prefetcher::predict(uint32_t layer, const float * x, const std::vector<int32_t> * next) {
    if (predictors_.empty() && next == nullptr) {
        return;
    }
    const auto start = std::chrono::steady_clock::now();
    if (next != nullptr) {
        if (rules_.replay_recall >= 0.0f && layer + 1 < index_.layers.size()) {
            guess(layer + 1, replayed(layer + 1, *next), records_.back(), pending_.back());
            replayed_for_ = layer + 1;
        }
    } else {
        for (size_t p = 0; p < predictors_.size(); ++p) {
            if (predictors_[p].source == layer) {
                guess(predictors_[p].target, predictors_[p].guess(x), records_[p], pending_[p]);
            }
        }
    }
    stats_.predict_ns += nanoseconds_since(start);
}

// The next layer's ids with as many errors as the rules say: what a predictor of that recall would have guessed.
std::vector<uint32_t> Prefetcher::replayed(uint32_t target, const std::vector<int32_t> & ids) {
    const uint32_t        n_expert = index_.layers[target].n_expert;
    std::vector<uint32_t> guesses;
    const auto            roll = [this] {
        chance_ = chance_ * 1664525u + 1013904223u;
        return chance_ >> 8;
    };
    for (int32_t id : ids) {
        auto expert = static_cast<uint32_t>(id);
        if (static_cast<float>(roll()) >= rules_.replay_recall * static_cast<float>(1u << 24)) {
            do {
                expert = roll() % n_expert;
            } while (n_expert > ids.size() &&
                     std::find(ids.begin(), ids.end(), static_cast<int32_t>(expert)) != ids.end());
        }
        if (std::find(guesses.begin(), guesses.end(), expert) == guesses.end()) {
            guesses.push_back(expert);
        }
    }
    return guesses;
}

void Prefetcher::guess(uint32_t target, const std::vector<uint32_t> & experts, Record & record,
                       std::vector<Guess> & pending) {
    SlotStore & store = store_of(target);
    auto        n     = static_cast<float>(
        std::count_if(loads_.begin(), loads_.end(), [target](const Load & l) { return l.layer == target && !l.keep; }));
    pending.clear();
    for (uint32_t rank = 0; rank < experts.size(); ++rank) {
        const uint32_t expert = experts[rank];
        const float    chance = record.chance(rank);
        if (chance >= rules_.least_chance) {
            store.expect(dense(target, expert)); // what is here already stays until its layer has spoken
        }
        if (store.slot_of(dense(target, expert)) != SlotStore::kNone) {
            continue;
        }
        pending.push_back({expert, rank, false});
        if (chance >= rules_.least_chance && n + 1.0f <= room_ && begin(target, expert, false)) {
            pending.back().begun = true;
            n += 1.0f;
        }
    }
}

void Prefetcher::expect(uint32_t layer, const std::vector<uint32_t> & experts, bool keep) {
    SlotStore & store = store_of(layer);
    for (uint32_t expert : experts) {
        if (!keep) {
            store.expect(dense(layer, expert));
        }
        if (store.slot_of(dense(layer, expert)) == SlotStore::kNone) {
            begin(layer, expert, keep);
        }
    }
}

bool Prefetcher::begin(uint32_t layer, uint32_t expert, bool keep) {
    SlotStore &    store   = store_of(layer);
    uint32_t       evicted = SlotStore::kNone;
    const uint32_t slot    = store.claim_for_prefetch(dense(layer, expert), !keep, &evicted);
    if (slot == SlotStore::kNone) {
        return false;
    }
    const uint32_t shape_class = index_.layers[layer].shape_class;
    if (evicted != SlotStore::kNone) {
        ++stats_.evictions;
        this->evicted(shape_class, slot);
        const auto [owner, id] = index_.owner(shape_class, evicted);
        events_.push({static_cast<uint32_t>(stats_.steps_layers), static_cast<uint16_t>(owner),
                      static_cast<uint16_t>(id), PYE_EVENT_EVICT, 0});
    }
    source_.load_begin(layer, expert, slot, Urgency::Prefetch);
    loads_.push_back({layer, expert, shape_class, slot, keep, false});
    ++stats_.prefetches;
    events_.push({static_cast<uint32_t>(stats_.steps_layers), static_cast<uint16_t>(layer),
                  static_cast<uint16_t>(expert), PYE_EVENT_PREFETCH, 0});
    return true;
}

void Prefetcher::give_up(Load & load) {
    if (!load.given_up) {
        load.given_up = true;
        source_.cancel(load.layer, load.slot);
    }
}

bool Prefetcher::give_way(uint32_t shape_class) {
    for (auto load = loads_.rbegin(); load != loads_.rend(); ++load) { // the last was the least likely
        if (load->shape_class == shape_class && !load->given_up) {
            give_up(*load);
            return true;
        }
    }
    return std::any_of(loads_.begin(), loads_.end(),
                       [shape_class](const Load & l) { return l.shape_class == shape_class; });
}

void Prefetcher::drain() {
    for (Load & load : loads_) {
        give_up(load);
    }
    while (!loads_.empty()) {
        landed(source_.disk().load_wait());
    }
}

} // namespace pye
