#include "ram_tier.h"

#include "error.h"
#include "rounding.h"
#include "slot_memory.h"

#include <stdexcept>

namespace pye {

RamTier::RamTier(const ExpertIndex & index, ggml_backend_dev_t gpu) : index_(index), buft_(host_buffer_type(gpu)) {
    for (uint32_t c = 0; c < index.classes.size(); ++c) {
        const uint32_t n_expert = index.classes[c].n_expert;
        classes_.push_back({SlotStore(n_expert), std::vector<uint8_t>(n_expert, 0), nullptr, nullptr});
        all_left_vram(c);
    }
}

void RamTier::resize(const std::vector<uint32_t> & n_slot) {
    for (size_t c = 0; c < n_slot.size(); ++c) {
        Class & k = classes_[c];
        if (k.store.n_slot() != n_slot[c]) {
            k.store.resize(0);
            if (k.store.n_slot() != 0) {
                throw std::logic_error("the RAM tier is resized while it is in use");
            }
            k.buffer.reset();
        }
    }
    for (size_t c = 0; c < n_slot.size(); ++c) {
        Class & k = classes_[c];
        if (k.store.n_slot() == n_slot[c]) {
            continue;
        }
        // A page more, so that slots begin at pages.
        const size_t size = index_.classes[c].stride * n_slot[c] + platform::kPage;
        k.buffer.reset(ggml_backend_buft_alloc_buffer(buft_, size));
        if (k.buffer == nullptr) {
            throw Error(PYE_E_MEMORY, "cannot take " + std::to_string(size) + " bytes of RAM for experts");
        }
        k.base = reinterpret_cast<uint8_t *>(
            round_up(reinterpret_cast<uintptr_t>(ggml_backend_buffer_get_base(k.buffer.get())), platform::kPage));
        k.store.resize(n_slot[c]);
    }
}

uint8_t * RamTier::at(uint32_t layer, uint32_t slot) {
    return class_of(layer).base + slot * index_.classes[index_.layers[layer].shape_class].stride;
}

const uint8_t * RamTier::find(uint32_t layer, uint32_t expert) {
    SlotStore & store = class_of(layer).store;
    if (!store.ready(dense(layer, expert))) {
        return nullptr;
    }
    const uint32_t slot = store.slot_of(dense(layer, expert));
    store.touch(slot);
    store.pin(slot);
    return at(layer, slot);
}

RamSlots RamTier::slots(uint32_t layer) {
    const Class & k = class_of(layer);
    return {index_.layers[layer], index_.classes[index_.layers[layer].shape_class].stride, k.base, k.buffer.get()};
}

void RamTier::unpin(uint32_t layer, uint32_t expert) {
    SlotStore & store = class_of(layer).store;
    store.unpin(store.slot_of(dense(layer, expert)));
}

uint8_t * RamTier::claim(uint32_t layer, uint32_t expert) {
    SlotStore & store = class_of(layer).store;
    if (store.slot_of(dense(layer, expert)) != SlotStore::kNone) {
        return nullptr;
    }
    uint32_t       evicted = SlotStore::kNone;
    const uint32_t slot    = store.claim_for_prefetch(dense(layer, expert), false, &evicted);
    return slot == SlotStore::kNone ? nullptr : at(layer, slot);
}

uint8_t * RamTier::claim_for_demotion(uint32_t layer, uint32_t expert, bool passes) {
    if (passes) {
        return claim(layer, expert);
    }
    SlotStore & store = class_of(layer).store;
    if (store.slot_of(dense(layer, expert)) != SlotStore::kNone) {
        return nullptr;
    }
    uint32_t       evicted = SlotStore::kNone;
    const uint32_t slot    = store.claim_by_worth(dense(layer, expert), &evicted);
    return slot == SlotStore::kNone ? nullptr : at(layer, slot);
}

void RamTier::arrived(uint32_t layer, uint32_t expert, bool ok) {
    SlotStore &    store = class_of(layer).store;
    const uint32_t slot  = store.slot_of(dense(layer, expert));
    if (!ok) {
        store.failed(slot);
        return;
    }
    store.landed(slot);
    store.unpin(slot);
}

// What is not in VRAM is "expected": no victim while there are others.
void RamTier::entered_vram(uint32_t layer, uint32_t expert) {
    class_of(layer).in_vram[dense(layer, expert)] = 1;
    class_of(layer).store.forget_expected(dense(layer, expert), 1);
}

void RamTier::left_vram(uint32_t layer, uint32_t expert) {
    class_of(layer).in_vram[dense(layer, expert)] = 0;
    class_of(layer).store.expect(dense(layer, expert));
}

void RamTier::all_left_vram(uint32_t shape_class) {
    Class & k = classes_[shape_class];
    for (uint32_t e = 0; e < k.in_vram.size(); ++e) {
        k.in_vram[e] = 0;
        k.store.expect(e);
    }
}

void RamTier::set_priorities(uint32_t shape_class, const std::vector<float> & priorities) {
    classes_[shape_class].store.set_priorities(priorities);
}

std::vector<uint32_t> RamTier::slots_by_class() const {
    std::vector<uint32_t> n;
    for (const Class & k : classes_) {
        n.push_back(k.store.n_slot());
    }
    return n;
}

uint64_t RamTier::n_slot() const {
    uint64_t n = 0;
    for (const Class & k : classes_) {
        n += k.store.n_slot();
    }
    return n;
}

uint64_t RamTier::n_resident() const {
    uint64_t n = 0;
    for (const Class & k : classes_) {
        n += k.store.n_resident();
    }
    return n;
}

uint64_t RamTier::bytes() const {
    uint64_t n = 0;
    for (size_t c = 0; c < classes_.size(); ++c) {
        n += classes_[c].store.n_slot() * index_.classes[c].stride;
    }
    return n;
}

} // namespace pye
