// Slots in a GPU's memory: for each matrix one tensor [ne0, ne1, n_slot] as the GPU's own kernels want it. One tensor for a
// matrix, because kernels count in blocks of its type: slots that hold several matrices have no stride that suits them all.
#pragma once

#include "expert_index.h"
#include "slot_memory.h"

#include "ggml-backend.h"

#include <atomic>
#include <vector>

namespace pye {

class DeviceArena : public SlotMemory {
  public:
    // Takes the memory at once, zeroed. Throws Error(PYE_E_MEMORY), or PYE_E_UNSUPPORTED if the GPU's kernels lack a type.
    DeviceArena(ggml_backend_dev_t gpu, const ExpertLayer & layer, uint32_t n_slot, uint32_t n_expert_used);
    ~DeviceArena() override;

    void      write(uint32_t slot, uint32_t place, const uint8_t * bytes) override;
    void      read(uint32_t slot, uint32_t place, uint8_t * bytes) const override;
    void      release(uint32_t) override {} // the memory goes with the arena
    uint8_t * at(uint32_t) override { return nullptr; }

    ggml_tensor * view(ggml_context * ctx, uint32_t place, uint32_t first, uint32_t n) const override;
    bool          pairs_with_next(uint32_t) const override { return false; } // the GPU's kernels fuse by themselves
    ggml_tensor * view_pair(ggml_context * ctx, uint32_t place, uint32_t first, uint32_t n) const override;
    std::string   layout(uint32_t place) const override;

  private:
    struct Matrix {
        ggml_type             type;
        int64_t               ne0, ne1;
        uint64_t              bytes; // of one expert
        ggml_backend_buffer_t buffer;
        uint8_t *             base;
    };

    void free();

    std::vector<Matrix> matrices_;
};

} // namespace pye
