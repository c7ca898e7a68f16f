// Experts in host memory, as they lie in the file, between the disk and a GPU: what leaves VRAM need not be read again. The
// memory is what the GPU copies from fastest (pinned, where its ggml back-end has that).
//
// VRAM and RAM together hold most when they hold different experts: what is in VRAM is the first victim here.
//
// The engine's lock covers it; the bytes of a claimed or pinned expert may be touched by I/O threads.
#pragma once

#include "expert_index.h"
#include "ram_slots.h"
#include "slot_store.h"

#include "ggml-backend.h"

#include <vector>

namespace pye {

class RamTier {
  public:
    // `budget` in bytes; classes share it as they share VRAM. Throws Error(PYE_E_MEMORY).
    RamTier(const ExpertIndex & index, ggml_backend_dev_t gpu, const std::vector<uint32_t> & n_slot);
    ~RamTier();

    RamTier(const RamTier &)             = delete;
    RamTier & operator=(const RamTier &) = delete;

    // The bytes of an expert that is here, which stay until landed() is called for it; nullptr if it is not.
    const uint8_t * find(uint32_t layer, uint32_t expert);
    // The same for an expert that the CPU computes where it is: pinned until computed() is called for it.
    void     pin(uint32_t layer, uint32_t expert) { find(layer, expert); }
    void     computed(uint32_t layer, uint32_t expert);
    bool     holds(uint32_t layer, uint32_t expert) { return class_of(layer).store.ready(dense(layer, expert)); }
    uint32_t slot_of(uint32_t layer, uint32_t expert) { return class_of(layer).store.slot_of(dense(layer, expert)); }
    RamSlots slots(uint32_t layer); // of its shape class
    // Room for an absent expert, whose bytes are written until landed() is called for it; nullptr: none to be had.
    uint8_t * claim(uint32_t layer, uint32_t expert);
    // What find() or claim() began has ended; if in good order, the expert is in VRAM now.
    void landed(uint32_t layer, uint32_t expert, bool ok);
    // The expert has left VRAM.
    void left_vram(uint32_t layer, uint32_t expert);

    uint64_t n_slot() const;
    uint64_t n_resident() const;
    uint64_t bytes() const; // of all slots

  private:
    struct Class {
        SlotStore             store;
        ggml_backend_buffer_t buffer = nullptr;
        uint8_t *             base   = nullptr;
    };

    Class &   class_of(uint32_t layer) { return classes_[index_.layers[layer].shape_class]; }
    uint32_t  dense(uint32_t layer, uint32_t expert) const { return index_.layers[layer].first + expert; }
    uint8_t * at(uint32_t layer, uint32_t slot);

    const ExpertIndex & index_;
    std::vector<Class>  classes_;
};

} // namespace pye
