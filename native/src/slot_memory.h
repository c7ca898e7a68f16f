// The memory of one shape class's slots, wherever its kernels run: in RAM for the CPU's, in VRAM for a GPU's. Knows which
// bytes go where in a slot; does not know which expert a slot holds.
#pragma once

#include "ggml-backend.h"
#include "ggml.h"

#include <cstdint>
#include <string>

namespace pye {

// The question llama.cpp's loader asks before it puts a weight into a buffer type: whether the device multiplies by it there.
bool multiplies_from(ggml_backend_dev_t device, ggml_backend_buffer_type_t buft, ggml_type type, int64_t ne0,
                     int64_t ne1, uint32_t n_expert, uint32_t n_expert_used);

// Memory of the host that the device copies to and from fastest: pinned, where its back-end has that.
ggml_backend_buffer_type_t host_buffer_type(ggml_backend_dev_t device);

class SlotMemory {
  public:
    SlotMemory()          = default;
    virtual ~SlotMemory() = default;

    SlotMemory(const SlotMemory &)             = delete;
    SlotMemory & operator=(const SlotMemory &) = delete;

    // Write one matrix of an expert, file layout, into a slot. Any thread; one writer per (slot, matrix). Returns once the
    // bytes are there. Throws Error.
    virtual void write(uint32_t slot, uint32_t place, const uint8_t * bytes) = 0;
    // Read one matrix of a slot that is not being written, file layout. Any thread. Throws Error if the slots keep another.
    virtual void read(uint32_t slot, uint32_t place, uint8_t * bytes) const = 0;
    // The slot's content is no longer needed.
    virtual void release(uint32_t slot) = 0;
    // Where a slot's image can be written as it lies; nullptr: only by write().
    virtual uint8_t * at(uint32_t slot) = 0;

    // Slots [first, first + n) of one matrix as a tensor [ne0, ne1, n]. Made in `ctx` (no_alloc).
    virtual ggml_tensor * view(ggml_context * ctx, uint32_t place, uint32_t first, uint32_t n) const = 0;
    // Whether matrix `place + 1` follows `place` without a gap in the same layout and width, so that both together are one
    // matrix [ne0, 2 * ne1]: one multiplication then serves gate and up.
    virtual bool          pairs_with_next(uint32_t place) const                                           = 0;
    virtual ggml_tensor * view_pair(ggml_context * ctx, uint32_t place, uint32_t first, uint32_t n) const = 0;

    // E.g. "q4_0 repacked" for each matrix.
    virtual std::string layout(uint32_t place) const = 0;
};

} // namespace pye
