#include "layer_step.h"

#include "elapsed.h"
#include "error.h"

#include <algorithm>
#include <chrono>

namespace pye {

LayerStep::LayerStep(Engine & engine, uint32_t layer)
    : engine_(engine), number_(layer), layer_(engine.index_.layers[layer]),
      store_(*engine.classes_[layer_.shape_class].store) {}

// Delegates, so that the destructor unpins and waits even if this body throws.
LayerStep::LayerStep(Engine & engine, uint32_t layer, const std::vector<Wanted> & wanted) : LayerStep(engine, layer) {
    // Hits first: the ids arrive as a set, and a load for one member must not push out another.
    std::vector<Wanted> missing;
    ready_.reserve(wanted.size());
    for (const Wanted & w : wanted) {
        if (store_.ready(dense(w.expert))) {
            const uint32_t slot = slot_of(w.expert);
            store_.touch(slot);
            store_.pin(slot);
            ready_.push_back(w.expert);
            ++engine_.stats_.hits;
            event(number_, w.expert, PYE_EVENT_HIT, w.pairs);
        } else {
            missing.push_back(w);
            ++engine_.stats_.misses;
            event(number_, w.expert, PYE_EVENT_MISS, w.pairs);
        }
    }
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

void LayerStep::begin_loads() {
    while (!waiting_.empty()) {
        uint32_t       evicted = SlotStore::kNone;
        const uint32_t slot    = store_.claim(dense(waiting_.back()), &evicted);
        if (slot == SlotStore::kNone) {
            return;
        }
        if (evicted != SlotStore::kNone) {
            ++engine_.stats_.evictions;
            // The class numbers experts over its layers: find the layer again.
            for (uint32_t l : engine_.index_.classes[layer_.shape_class].layers) {
                const ExpertLayer & owner = engine_.index_.layers[l];
                if (evicted >= owner.first && evicted < owner.first + owner.n_expert) {
                    event(l, evicted - owner.first, PYE_EVENT_EVICT, 0);
                }
            }
        }
        engine_.source_->load_begin(number_, waiting_.back(), slot);
        ++n_loading_;
        waiting_.pop_back();
    }
}

void LayerStep::take(const DiskTier::Landed & landed) {
    const uint32_t slot   = ExpertSource::slot_of(landed);
    const uint32_t expert = store_.expert_in(slot) - layer_.first;
    --n_loading_;
    if (landed.ok) {
        store_.landed(slot);
        ready_.push_back(expert);
    } else if (engine_.source_->load_again(number_, expert, slot)) {
        ++n_loading_;
        engine_.notice(landed.why + "; expert " + std::to_string(expert) + " of layer " + std::to_string(number_) +
                       " is read from the model's file instead");
    } else {
        store_.failed(slot);
        failure_ = landed.why;
    }
}

std::vector<uint32_t> LayerStep::next() {
    DiskTier::Landed landed;
    while (n_loading_ > 0 && engine_.source_->disk().load_poll(&landed)) {
        take(landed);
    }
    while (ready_.empty() && n_loading_ > 0 && failure_.empty()) {
        const auto start = std::chrono::steady_clock::now();
        take(engine_.source_->disk().load_wait());
        engine_.stats_.stall_ns += nanoseconds_since(start);
    }
    if (!failure_.empty()) {
        throw Error(PYE_E_FILE, "expert load failed: " + failure_);
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
