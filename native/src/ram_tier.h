// Experts in host memory, as they lie in the file, between the disk and a GPU: what leaves VRAM need not be read again. The
// memory is what the GPU copies from and to fastest (pinned, where its ggml back-end has that).
//
// VRAM and RAM together hold most when they hold different experts. So what is read goes to VRAM alone while RAM is full;
// what leaves VRAM without a copy here is copied back, unless everyone here is worth more; and copies of what is in VRAM
// leave first. On a real trace this reads a fifth of what keeping everything that passes through would (bench/ram_tiers.py).
//
// The engine's lock covers it; the bytes of an expert that comes or is pinned may be touched by I/O threads.
#pragma once

#include "expert_index.h"
#include "ram_slots.h"
#include "slot_store.h"

#include "ggml-backend.h"

#include <memory>
#include <vector>

namespace pye {

class RamTier {
  public:
    // Without slots, until resize(). Their memory is what `gpu` copies to and from fastest.
    RamTier(const ExpertIndex & index, ggml_backend_dev_t gpu);

    RamTier(const RamTier &)             = delete;
    RamTier & operator=(const RamTier &) = delete;

    // Slots by shape class, while nothing is pinned or comes. Pinned memory is given back as a whole, and the CPU's kernels want a
    // class's slots side by side: so a class whose slots become more or fewer loses what is in them. First the old memory goes,
    // then the new is taken: if that is not there, Error(PYE_E_MEMORY), and such classes are left without slots.
    void resize(const std::vector<uint32_t> & n_slot);

    // The bytes of an expert that is here, which stay until unpin(); nullptr if it is not.
    const uint8_t * find(uint32_t layer, uint32_t expert);
    void            unpin(uint32_t layer, uint32_t expert);
    void            pin(uint32_t layer, uint32_t expert) { find(layer, expert); }
    bool            holds(uint32_t layer, uint32_t expert) { return class_of(layer).store.ready(dense(layer, expert)); }
    bool            comes(uint32_t layer, uint32_t expert) {
        return slot_of(layer, expert) != SlotStore::kNone && !holds(layer, expert);
    }
    uint32_t slot_of(uint32_t layer, uint32_t expert) { return class_of(layer).store.slot_of(dense(layer, expert)); }
    RamSlots slots(uint32_t layer); // of its shape class
    // An empty slot for an absent expert, whose bytes are written until arrived(); nullptr: it is here or coming, or there is
    // none.
    uint8_t * claim(uint32_t layer, uint32_t expert);
    // The same for one that leaves VRAM, in the place of whoever is worth less. `passes`: it was needed once, as every expert
    // of its layer was, so nobody leaves for it.
    uint8_t * claim_for_demotion(uint32_t layer, uint32_t expert, bool passes);
    // What a claim began has ended.
    void arrived(uint32_t layer, uint32_t expert, bool ok);

    // Where an expert is beside here.
    void entered_vram(uint32_t layer, uint32_t expert);
    void left_vram(uint32_t layer, uint32_t expert);
    void all_left_vram(uint32_t shape_class);

    // Of a class, as its slots in VRAM have them.
    void set_priorities(uint32_t shape_class, const std::vector<float> & priorities);
    // Who should come while there are empty slots: of the experts that `may_come`, those in VRAM last, by priority, ties by
    // number. False: nobody, or nobody has room.
    template <class F> bool next_to_fill(F && may_come, uint32_t * layer, uint32_t * expert) const;

    std::vector<uint32_t> slots_by_class() const;

    uint64_t n_slot() const;
    uint64_t n_resident() const;
    uint64_t bytes() const; // of all slots

  private:
    struct Free {
        void operator()(ggml_backend_buffer_t b) const { ggml_backend_buffer_free(b); }
    };
    struct Class {
        SlotStore                                  store;
        std::vector<uint8_t>                       in_vram; // by expert
        std::unique_ptr<ggml_backend_buffer, Free> buffer;
        uint8_t *                                  base = nullptr;
    };

    Class &   class_of(uint32_t layer) { return classes_[index_.layers[layer].shape_class]; }
    uint32_t  dense(uint32_t layer, uint32_t expert) const { return index_.layers[layer].first + expert; }
    uint8_t * at(uint32_t layer, uint32_t slot);

    const ExpertIndex &        index_;
    ggml_backend_buffer_type_t buft_;
    std::vector<Class>         classes_;
};

template <class F> bool RamTier::next_to_fill(F && may_come, uint32_t * layer, uint32_t * expert) const {
    for (uint32_t c = 0; c < classes_.size(); ++c) {
        const Class & k    = classes_[c];
        uint32_t      best = SlotStore::kNone;
        for (uint32_t e = 0; e < k.in_vram.size() && k.store.has_empty(); ++e) {
            const auto better = [&] {
                return k.in_vram[e] != k.in_vram[best] ? k.in_vram[e] < k.in_vram[best]
                                                       : k.store.priority(e) > k.store.priority(best);
            };
            if (k.store.slot_of(e) == SlotStore::kNone && (best == SlotStore::kNone || better())) {
                const auto [owner, id] = index_.owner(c, e);
                if (may_come(owner, id)) {
                    best = e;
                }
            }
        }
        if (best != SlotStore::kNone) {
            const auto [owner, id] = index_.owner(c, best);
            *layer                 = owner;
            *expert                = id;
            return true;
        }
    }
    return false;
}

} // namespace pye
