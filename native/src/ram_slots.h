// The RAM tier's slots of one shape class as tensors: experts in file layout, for the CPU's kernels.
#pragma once

#include "expert_index.h"
#include "slot_memory.h"

namespace pye {

class RamSlots : public SlotMemory {
  public:
    // Slots of `stride` bytes from `base` on, in `buffer`.
    RamSlots(const ExpertLayer & layer, uint64_t stride, uint8_t * base, ggml_backend_buffer_t buffer)
        : layer_(layer), stride_(stride), base_(base), buffer_(buffer) {}

    void      write(uint32_t slot, uint32_t place, const uint8_t * bytes) override;
    void      read(uint32_t slot, uint32_t place, uint8_t * bytes) const override;
    void      release(uint32_t) override {}
    uint8_t * at(uint32_t slot) override { return base_ + slot * stride_; }

    ggml_tensor * view(ggml_context * ctx, uint32_t place, uint32_t first, uint32_t n) const override;
    bool          pairs_with_next(uint32_t) const override { return false; }
    ggml_tensor * view_pair(ggml_context *, uint32_t, uint32_t, uint32_t) const override;
    std::string   layout(uint32_t place) const override;

  private:
    const ExpertLayer &   layer_;
    uint64_t              stride_;
    uint8_t *             base_;
    ggml_backend_buffer_t buffer_;
};

} // namespace pye
