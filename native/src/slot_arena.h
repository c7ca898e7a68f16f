// The memory of one shape class's slots, in the layout the stock CPU kernels want, seen as ggml tensors. Knows which
// bytes go where in a slot; does not know which expert a slot holds.
#pragma once

#include "expert_index.h"

#include "ggml-backend.h"

#include <atomic>
#include <memory>
#include <string>
#include <vector>

namespace pye {

class SlotArena {
  public:
    // Reserves addresses for `n_slot` slots; memory comes with the first write into a slot.
    // Throws Error(PYE_E_MEMORY).
    SlotArena(const ShapeClass & shape, const ExpertLayer & layer, uint32_t n_slot, uint32_t n_expert_used);
    ~SlotArena();

    SlotArena(const SlotArena &)             = delete;
    SlotArena & operator=(const SlotArena &) = delete;

    // Write one matrix of an expert, file layout, into a slot. Any thread; one writer per (slot, matrix).
    void write(uint32_t slot, uint32_t place, const uint8_t * bytes);
    // Give the memory of a slot back to the system.
    void release(uint32_t slot);

    // Slots [first, first + n) of one matrix as a tensor [ne0, ne1, n] whose nb[2] is the stride. Made in `ctx` (no_alloc).
    ggml_tensor * view(ggml_context * ctx, uint32_t place, uint32_t first, uint32_t n) const;
    // Whether matrix `place + 1` follows `place` without a gap in the same layout and width, so that both together are one
    // matrix [ne0, 2 * ne1]: one multiplication then serves gate and up.
    bool          pairs_with_next(uint32_t place) const;
    ggml_tensor * view_pair(ggml_context * ctx, uint32_t place, uint32_t first, uint32_t n) const;

    // Whether matrix-matrix kernels give what matrix-vector kernels give, up to the order of sums, for every matrix. Those
    // for types that meet activations of 256 values a block (K types) quantise activations by another rule, four rows at a
    // time; those for floats round activations that differ in their last bit to other halves.
    bool rounds_alike() const;

    uint64_t  stride() const { return stride_; }
    uint8_t * at(uint32_t slot) { return base_ + slot * stride_; }
    bool      repacks(uint32_t place) const { return matrices_[place].repacked; }
    // What tells the layout of a matrix from others: the checksum of a known pattern in it. 0 if it is the file's.
    uint64_t signature(uint32_t place) const;
    // E.g. "q4_0 repacked" for each matrix.
    std::string layout(uint32_t place) const;

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
