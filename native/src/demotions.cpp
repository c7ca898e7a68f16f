#include "demotions.h"

#include <exception>

namespace pye {

Demotions::Demotions(const ExpertIndex & index, Link & link) : index_(index), link_(link) {
    for (const ShapeClass & c : index.classes) {
        by_slot_.push_back(std::make_unique<Demotion[]>(c.n_expert));
    }
}

void Demotions::begin(uint32_t shape_class, uint32_t slot, uint32_t layer, uint32_t expert, uint8_t * to) {
    Demotion & d = by_slot_[shape_class][slot];
    d.layer      = layer;
    d.expert     = expert;
    d.to         = to;
    d.copied.store(0, std::memory_order_relaxed);
    d.failed.store(false, std::memory_order_relaxed);
}

void Demotions::before_write(uint32_t shape_class, uint32_t slot, const SlotMemory & slots, const ExpertMatrix & m) {
    Demotion & d = by_slot_[shape_class][slot];
    if (d.to == nullptr || d.failed.load(std::memory_order_relaxed)) {
        return;
    }
    try {
        link_.move(m.bytes, [&] { slots.read(slot, m.place, d.to + m.in_slot); });
        d.copied.fetch_or(1u << m.place, std::memory_order_relaxed);
    } catch (const std::exception &) { // the expert is on disk: who needs it again reads it
        d.failed.store(true, std::memory_order_relaxed);
    }
}

bool Demotions::end(uint32_t shape_class, uint32_t slot, const SlotMemory & slots, Ended * ended) {
    Demotion & d = by_slot_[shape_class][slot];
    if (d.to == nullptr) {
        return false;
    }
    for (const ExpertMatrix & m : index_.layers[d.layer].matrices) {
        if ((d.copied.load(std::memory_order_relaxed) >> m.place & 1) == 0) {
            before_write(shape_class, slot, slots, m);
        }
    }
    *ended = {d.layer, d.expert, !d.failed.load(std::memory_order_relaxed)};
    d.to   = nullptr;
    return true;
}

} // namespace pye
