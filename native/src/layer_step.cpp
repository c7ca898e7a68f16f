#include "layer_step.h"

#include "elapsed.h"
#include "error.h"

#include <algorithm>
#include <chrono>

namespace pye {

void list_wanted(const RowGroups & groups, uint32_t n_expert, std::vector<Wanted> * wanted) {
    wanted->clear();
    for (uint32_t e = 0; e < n_expert; ++e) {
        if (groups.count(e) != 0) {
            wanted->push_back({e, groups.count(e)});
        }
    }
}

LayerStep::LayerStep(Engine & engine, uint32_t layer)
    : engine_(engine), number_(layer), layer_(engine.index_.layers[layer]),
      store_(*engine.classes_[layer_.shape_class].store) {}

// Delegates, so that the destructor unpins and waits even if this body throws.
LayerStep::LayerStep(Engine & engine, uint32_t layer, const std::vector<Wanted> & wanted, const Elsewhere & elsewhere)
    : LayerStep(engine, layer) {
    Prefetcher & prefetcher = *engine_.prefetcher_;
    prefetcher.settle();
    prefetcher.spoken(layer, wanted);
    // Hits first: the ids arrive as a set, and a load for one member must not push out another.
    std::vector<Wanted> missing;
    ready_.reserve(wanted.size());
    for (const Wanted & w : wanted) {
        if (store_.ready(dense(w.expert))) {
            const uint32_t slot = slot_of(w.expert);
            store_.touch(slot);
            store_.pin(slot);
            ready_.push_back(w.expert);
            prefetcher.used(layer, w.expert);
            ++engine_.stats_.hits;
            event(number_, w.expert, PYE_EVENT_HIT, w.pairs);
        } else {
            ++engine_.stats_.misses;
            event(number_, w.expert, PYE_EVENT_MISS, w.pairs);
            missing.push_back(w);
        }
    }
    if (elsewhere && !missing.empty()) {
        elsewhere(&missing);
    }
    missing.erase(std::remove_if(missing.begin(), missing.end(),
                                 [&](const Wanted & w) {
                                     const bool comes = prefetcher.adopt(layer, w.expert);
                                     n_loading_ += comes;
                                     if (comes) {
                                         adopted_.push_back(w.expert);
                                     }
                                     return comes;
                                 }),
                  missing.end());
    std::sort(missing.begin(), missing.end(), [](const Wanted & a, const Wanted & b) {
        return a.pairs != b.pairs ? a.pairs < b.pairs : a.expert > b.expert;
    });
    for (const Wanted & w : missing) {
        waiting_.push_back(w.expert);
    }
    begin_loads();
}

LayerStep::~LayerStep() {
    while (n_loading_ > 0) {
        take(engine_.source_->disk().load_wait());
    }
    for (uint32_t e : ready_) {
        store_.unpin(slot_of(e));
    }
    for (uint32_t e : out_) {
        store_.unpin(slot_of(e));
    }
}

void LayerStep::event(uint32_t layer, uint32_t expert, uint16_t kind, uint32_t pairs) {
    engine_.events_.push({static_cast<uint32_t>(engine_.stats_.steps_layers), static_cast<uint16_t>(layer),
                          static_cast<uint16_t>(expert), kind,
                          static_cast<uint16_t>(std::min<uint32_t>(pairs, UINT16_MAX))});
}

// Loads for those that wait, as far as there are slots.
void LayerStep::begin_loads() {
    for (size_t i = waiting_.size(); i-- > 0;) {
        const uint32_t expert = waiting_[i];
        const uint32_t slot   = slot_of(expert);
        if (slot == SlotStore::kNone) {
            if (!claim(expert)) {
                return;
            }
            engine_.source_->load_begin(number_, expert, slot_of(expert));
            ++n_loading_;
        } else if (store_.ready(dense(expert))) { // its prefetch was given up too late to stop it
            store_.touch(slot);
            store_.pin(slot);
            ready_.push_back(expert);
        } else {
            continue; // being read for a prefetch that was given up
        }
        waiting_.erase(waiting_.begin() + static_cast<std::ptrdiff_t>(i));
    }
}

// A slot for an expert. False if all are pinned or being filled; prefetches give way.
bool LayerStep::claim(uint32_t expert) {
    uint32_t evicted = SlotStore::kNone;
    uint32_t slot    = store_.claim(dense(expert), &evicted);
    while (slot == SlotStore::kNone && engine_.prefetcher_->give_way(layer_.shape_class)) {
        take(engine_.source_->disk().load_wait());
        slot = store_.claim(dense(expert), &evicted);
    }
    if (slot == SlotStore::kNone) {
        return false;
    }
    engine_.prefetcher_->evicted(layer_.shape_class, slot);
    if (evicted != SlotStore::kNone) {
        ++engine_.stats_.evictions;
        const auto [owner, id] = engine_.index_.owner(layer_.shape_class, evicted);
        engine_.source_->evicted(owner, id, slot, store_.victim_passed());
        event(owner, id, PYE_EVENT_EVICT, 0);
    }
    return true;
}

void LayerStep::take(const DiskTier::Landed & landed) {
    if (engine_.prefetcher_->landed(landed)) {
        return;
    }
    const uint32_t slot    = ExpertSource::slot_of(landed);
    const uint32_t expert  = store_.expert_in(slot) - layer_.first;
    const bool     adopted = std::find(adopted_.begin(), adopted_.end(), expert) != adopted_.end();
    --n_loading_;
    engine_.timeline_.add(PYE_SPAN_DEMAND, number_, expert, landed.begun, landed.ended,
                          static_cast<uint16_t>((landed.ok ? Timeline::None : Timeline::GivenUp) |
                                                (adopted ? Timeline::Adopted : Timeline::None)));
    engine_.source_->landed(number_, expert, slot, landed.ok);
    if (landed.ok) {
        store_.landed(slot);
        ready_.push_back(expert);
        loaded_.push_back(expert);
    } else if (engine_.source_->load_again(number_, expert, slot)) {
        ++n_loading_;
        engine_.notice(landed.why + "; expert " + std::to_string(expert) + " of layer " + std::to_string(number_) +
                       " is read from the model's file instead");
    } else {
        store_.failed(slot);
        failure_ = landed.why;
    }
}

void LayerStep::pass_on() {
    for (uint32_t e : loaded_) {
        if (store_.ready(dense(e))) {
            store_.pass_on(slot_of(e));
        }
    }
}

std::vector<uint32_t> LayerStep::next() {
    DiskTier::Landed landed;
    while (engine_.source_->disk().load_poll(&landed)) {
        take(landed);
    }
    begin_loads();
    const bool all       = engine_.prefetcher_->rules().reorder == 0;
    const auto must_wait = [&] {
        return ready_.empty() ? n_loading_ > 0 || (!waiting_.empty() && engine_.prefetcher_->under_way())
                              : all && n_loading_ > 0;
    };
    while (failure_.empty() && must_wait()) {
        const auto start = std::chrono::steady_clock::now();
        take(engine_.source_->disk().load_wait());
        engine_.stats_.stall_ns += nanoseconds_since(start);
        engine_.timeline_.until_now(PYE_SPAN_STALL, number_, start);
        begin_loads();
    }
    if (!failure_.empty()) {
        throw Error(PYE_E_FILE, "expert load failed: " + failure_);
    }
    if (ready_.empty() && !waiting_.empty()) { // never computed without them
        throw Error(PYE_E_BUDGET, "layer " + std::to_string(number_) + " needs " + std::to_string(waiting_.size()) +
                                      " more expert slots than there are");
    }
    std::vector<uint32_t> group;
    group.swap(ready_);
    std::sort(group.begin(), group.end(), [this](uint32_t a, uint32_t b) { return slot_of(a) < slot_of(b); });
    out_.insert(out_.end(), group.begin(), group.end());
    return group;
}

void LayerStep::computed(const std::vector<uint32_t> & experts) {
    for (uint32_t e : experts) {
        store_.unpin(slot_of(e));
        out_.erase(std::find(out_.begin(), out_.end(), e));
    }
    begin_loads();
}

} // namespace pye
