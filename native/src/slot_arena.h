// Slots in RAM, in the layout the stock CPU kernels want.
#pragma once

#include "expert_index.h"
#include "slot_memory.h"

#include "ggml-backend.h"

#include <atomic>
#include <memory>
#include <string>
#include <vector>

namespace pye {

class SlotArena : public SlotMemory {
  public:
    // Reserves addresses for `n_slot` slots; memory comes with the first write into a slot.
    // Throws Error(PYE_E_MEMORY).
    SlotArena(const ShapeClass & shape, const ExpertLayer & layer, uint32_t n_slot, uint32_t n_expert_used);
    ~SlotArena() override;

    void      write(uint32_t slot, uint32_t place, const uint8_t * bytes) override;
    void      read(uint32_t slot, uint32_t place, uint8_t * bytes) const override;
    void      release(uint32_t slot) override; // gives the memory back to the system
    uint8_t * at(uint32_t slot) override { return base_ + slot * stride_; }

    ggml_tensor * view(ggml_context * ctx, uint32_t place, uint32_t first, uint32_t n) const override;
    bool          pairs_with_next(uint32_t place) const override;
    ggml_tensor * view_pair(ggml_context * ctx, uint32_t place, uint32_t first, uint32_t n) const override;
    std::string   layout(uint32_t place) const override;

    // Whether matrix-matrix kernels give what matrix-vector kernels give, up to the order of sums, for every matrix. Those
    // for types that meet activations of 256 values a block (K types) quantise activations by another rule, four rows at a
    // time; those for floats round activations that differ in their last bit to other halves.
    bool rounds_alike() const;

    uint64_t stride() const { return stride_; }
    bool     repacks(uint32_t place) const { return matrices_[place].repacked; }
    // What tells the layout of a matrix from others: the checksum of a known pattern in it. 0 if it is the file's.
    uint64_t signature(uint32_t place) const;

  private:
    struct Matrix {
        ggml_type             type;
        int64_t               ne0, ne1;
        uint64_t              bytes, in_slot;
        ggml_backend_buffer_t buffer   = nullptr; // over the whole arena; decides which kernels run
        void *                extra    = nullptr; // the kernels' own note on the layout
        bool                  repacked = false;
    };

    static void repack(const Matrix & m, int64_t ne1, const uint8_t * bytes, uint8_t * to);
    void        choose_layout(Matrix & m, uint32_t n_expert, uint32_t n_expert_used);

    uint64_t                             stride_ = 0;
    uint64_t                             size_   = 0;
    uint8_t *                            base_   = nullptr;
    std::vector<Matrix>                  matrices_;
    std::unique_ptr<std::atomic<bool>[]> populated_; // by slot
};

} // namespace pye
