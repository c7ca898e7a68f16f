#include "slot_store.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

namespace pye {

SlotStore::SlotStore(uint32_t n_expert)
    : slots_(n_expert), slot_of_(n_expert, kNone), priority_(n_expert, 0.0f), expected_(n_expert, 0) {}

std::vector<uint32_t> SlotStore::resize(uint32_t n_slot) {
    n_slot = std::min<uint32_t>(n_slot, static_cast<uint32_t>(slots_.size()));
    for (uint32_t s = 0; s < slots_.size() && n_slot_ < n_slot; ++s) {
        if (slots_[s].state == State::Retired) {
            slots_[s].state = State::Empty;
            ++n_slot_;
        }
    }
    std::vector<uint32_t> left;
    // Empty slots go first, from the high end, so that what stays keeps together.
    for (uint32_t s = static_cast<uint32_t>(slots_.size()); s-- > 0 && n_slot_ > n_slot;) {
        if (slots_[s].state == State::Empty) {
            slots_[s].state = State::Retired;
            left.push_back(s);
            --n_slot_;
        }
    }
    while (n_slot_ > n_slot) {
        const uint32_t s = victim(true);
        if (s == kNone) {
            break;
        }
        vacate(s);
        slots_[s].state = State::Retired;
        left.push_back(s);
        --n_slot_;
    }
    empty_.clear();
    for (uint32_t s = static_cast<uint32_t>(slots_.size()); s-- > 0;) {
        if (slots_[s].state == State::Empty) {
            empty_.push_back(s); // lowest last: taken first
        }
    }
    return left;
}

// With a slot for every expert, each expert has its own place: a layer then lies as it would in stock llama.cpp's buffer.
uint32_t SlotStore::empty_slot(uint32_t expert) {
    if (slots_[expert].state == State::Empty) {
        return expert;
    }
    while (!empty_.empty()) {
        const uint32_t s = empty_.back();
        if (slots_[s].state == State::Empty) {
            return s;
        }
        empty_.pop_back();
    }
    return kNone;
}

// `expected`: whether expected experts may be victims too.
uint32_t SlotStore::victim(bool expected) const {
    uint32_t best = kNone, passing = kNone;
    float    best_priority = 0.0f;
    for (uint32_t s = 0; s < slots_.size(); ++s) {
        const Slot & slot = slots_[s];
        if (slot.state != State::Ready || slot.pins != 0 || (!expected && expected_[slot.expert] != 0)) {
            continue;
        }
        if (slot.passing && (passing == kNone || slot.used > slots_[passing].used)) {
            passing = s;
        }
        const float p = priority_[slot.expert];
        if (best == kNone || p < best_priority || (p == best_priority && slot.used < slots_[best].used)) {
            best          = s;
            best_priority = p;
        }
    }
    return passing != kNone ? passing : best;
}

uint32_t SlotStore::claim(uint32_t expert, uint32_t * evicted) {
    if (slot_of_[expert] != kNone) {
        throw std::logic_error("claim of an expert that has a slot");
    }
    uint32_t s = empty_slot(expert);
    if (s == kNone) {
        s = victim(false);
    }
    if (s == kNone) {
        s = victim(true);
    }
    return fill(s, expert, evicted);
}

uint32_t SlotStore::claim_for_prefetch(uint32_t expert, bool evict, uint32_t * evicted) {
    if (slot_of_[expert] != kNone) {
        throw std::logic_error("claim of an expert that has a slot");
    }
    uint32_t s = empty_slot(expert);
    if (s == kNone && evict) {
        s = victim_for_prefetch();
    }
    return fill(s, expert, evicted);
}

uint32_t SlotStore::claim_by_worth(uint32_t expert, uint32_t * evicted) {
    if (slot_of_[expert] != kNone) {
        throw std::logic_error("claim of an expert that has a slot");
    }
    uint32_t s = empty_slot(expert);
    if (s == kNone) {
        s = spare();
    }
    if (s == kNone) {
        s = victim(true);
        s = s != kNone && priority_[slots_[s].expert] > priority_[expert] ? kNone : s;
    }
    return fill(s, expert, evicted);
}

uint32_t SlotStore::would_leave(uint32_t expert) {
    const uint32_t s = empty_slot(expert) == kNone ? victim_for_prefetch() : kNone;
    return s == kNone ? kNone : slots_[s].expert;
}

// Neither one that is expected nor one that an infinite priority pins.
uint32_t SlotStore::victim_for_prefetch() const {
    const uint32_t s = victim(false);
    return s != kNone && priority_[slots_[s].expert] == INFINITY ? kNone : s;
}

// Of those that nobody expects from here, the one that they will need here last: where they are instead, it leaves last.
uint32_t SlotStore::spare() const {
    uint32_t best = kNone;
    for (uint32_t s = 0; s < slots_.size(); ++s) {
        const Slot & slot = slots_[s];
        if (slot.state != State::Ready || slot.pins != 0 || expected_[slot.expert] != 0) {
            continue;
        }
        const auto standing = [this](const Slot & x) { return std::make_pair(priority_[x.expert], x.used); };
        if (best == kNone || standing(slots_[best]) < standing(slot)) {
            best = s;
        }
    }
    return best;
}

uint32_t SlotStore::fill(uint32_t slot, uint32_t expert, uint32_t * evicted) {
    *evicted = kNone;
    if (slot == kNone) {
        return kNone;
    }
    if (slots_[slot].state == State::Ready) {
        *evicted       = slots_[slot].expert;
        victim_passed_ = slots_[slot].passing;
        vacate(slot);
    }
    ++n_filled_;
    slots_[slot].state   = State::Loading;
    slots_[slot].expert  = expert;
    slots_[slot].used    = ++clock_;
    slots_[slot].filled  = clock_;
    slots_[slot].passing = false;
    slot_of_[expert]     = slot;
    return slot;
}

void SlotStore::forget_expected(uint32_t first, uint32_t n) { std::fill_n(expected_.begin() + first, n, uint8_t(0)); }

void SlotStore::vacate(uint32_t slot) {
    Slot & s           = slots_[slot];
    slot_of_[s.expert] = kNone;
    s.expert           = kNone;
    s.state            = State::Empty;
    --n_ready_;
    --n_filled_;
}

void SlotStore::landed(uint32_t slot) {
    Slot & s = slots_[slot];
    if (s.state != State::Loading) {
        throw std::logic_error("landed in a slot that was not loading");
    }
    s.state = State::Ready;
    ++s.pins;
    ++n_ready_;
}

void SlotStore::failed(uint32_t slot) {
    Slot & s = slots_[slot];
    if (s.state != State::Loading) {
        throw std::logic_error("failed load of a slot that was not loading");
    }
    slot_of_[s.expert] = kNone;
    s.expert           = kNone;
    s.state            = State::Empty;
    --n_filled_;
    if (std::find(empty_.begin(), empty_.end(), slot) ==
        empty_.end()) { // it never left if it was the expert's own place
        empty_.push_back(slot);
    }
}

void SlotStore::unpin(uint32_t slot) {
    if (slots_[slot].pins == 0) {
        throw std::logic_error("unpin of a slot that is not pinned");
    }
    --slots_[slot].pins;
}

void SlotStore::set_priorities(const std::vector<float> & priorities) {
    if (priorities.size() != priority_.size()) {
        throw std::logic_error("one priority per expert");
    }
    for (size_t i = 0; i < priorities.size(); ++i) {
        priority_[i] = std::isnan(priorities[i]) ? 0.0f : priorities[i];
    }
}

void SlotStore::check() const {
    uint32_t in_use = 0, ready = 0, n_filled = 0;
    for (uint32_t s = 0; s < slots_.size(); ++s) {
        const Slot & slot   = slots_[s];
        const bool   filled = slot.state == State::Ready || slot.state == State::Loading;
        in_use += slot.state != State::Retired;
        ready += slot.state == State::Ready;
        n_filled += filled;
        if (filled != (slot.expert != kNone) || (filled && slot_of_[slot.expert] != s) || (!filled && slot.pins != 0)) {
            throw std::logic_error("slot and directory disagree");
        }
    }
    for (uint32_t e = 0; e < slot_of_.size(); ++e) {
        if (slot_of_[e] != kNone && slots_[slot_of_[e]].expert != e) {
            throw std::logic_error("directory names a slot that holds another expert");
        }
    }
    if (in_use != n_slot_ || ready != n_ready_ || n_filled != n_filled_) {
        throw std::logic_error("slot counts are wrong");
    }
}

} // namespace pye
