// Which expert lives in which slot. Owns the directory, pins and the choice of victims of one shape class; knows nothing
// of bytes, files, kernels or ggml, so it is tested alone against a simple model.
//
// A slot goes EMPTY -> LOADING -> READY -> EMPTY, and from LOADING back to EMPTY if the load fails.
//   LOADING and pinned slots are never victims. RETIRED slots lie outside the budget.
// Not thread-safe: the engine's lock covers it.
#pragma once

#include <cstdint>
#include <vector>

namespace pye {

class SlotStore {
  public:
    static constexpr uint32_t kNone = UINT32_MAX;
    enum class State : uint8_t { Empty, Loading, Ready, Retired };

    // `n_expert` experts of this class, numbered densely over its layers; at most as many slots.
    explicit SlotStore(uint32_t n_expert);

    // Change the number of slots in use. Returns the slots that left (their memory may go); pinned and loading ones stay,
    // so the result can fall short of the wish while a step is under way.
    std::vector<uint32_t> resize(uint32_t n_slot);

    uint32_t n_slot() const { return n_slot_; }
    uint32_t n_resident() const { return n_ready_; }
    bool     has_empty() const { return n_filled_ < n_slot_; } // of the slots in use
    uint32_t slot_of(uint32_t expert) const { return slot_of_[expert]; }
    uint32_t expert_in(uint32_t slot) const { return slots_[slot].expert; }
    State    state(uint32_t slot) const { return slots_[slot].state; }
    // When a slot was last given to an expert; times are comparable with now().
    uint64_t filled(uint32_t slot) const { return slots_[slot].filled; }
    uint64_t now() const { return clock_; }
    bool     ready(uint32_t expert) const {
        return slot_of_[expert] != kNone && slots_[slot_of_[expert]].state == State::Ready;
    }

    // A slot for an absent expert: an empty one, else the victim (lowest priority, ties by oldest use; expected experts only
    // if there is no other), else kNone. The slot is LOADING afterwards; `*evicted` is the expert that left or kNone.
    uint32_t claim(uint32_t expert, uint32_t * evicted);
    // The same for an expert that may turn out not to be needed: never in the place of one that is expected or pinned by an
    // infinite priority, and without `evict` only in an empty slot.
    uint32_t claim_for_prefetch(uint32_t expert, bool evict, uint32_t * evicted);
    // The same for an expert that is worth a slot only by its priority: an empty one, else of those that are not expected that
    // of the highest priority, else that of the lowest, if it is not above its own.
    uint32_t claim_by_worth(uint32_t expert, uint32_t * evicted);
    // Who would leave for a prefetch; kNone: nobody, for there is an empty slot, or nobody may.
    uint32_t would_leave(uint32_t expert);
    void     landed(uint32_t slot); // LOADING -> READY, pinned once by the caller
    void     failed(uint32_t slot); // LOADING -> EMPTY

    void pin(uint32_t slot) { ++slots_[slot].pins; }
    void unpin(uint32_t slot);
    void touch(uint32_t slot) {
        slots_[slot].used    = ++clock_;
        slots_[slot].passing = false;
    }
    // The expert was needed once, as every expert of its layer was: until it is touched again it is the first victim, the
    // latest of such before the others. Layers that are all needed in turn would push each other out for nothing.
    void pass_on(uint32_t slot) { slots_[slot].passing = true; }

    // Likely to be used soon, so rather not a victim, until forgotten: experts [first, first + n).
    void expect(uint32_t expert) { expected_[expert] = 1; }
    void forget_expected(uint32_t first, uint32_t n);

    float priority(uint32_t expert) const { return priority_[expert]; }
    // Whether the one that left last was to pass on.
    bool victim_passed() const { return victim_passed_; }
    // One value per expert of the class; NaN counts as zero.
    void set_priorities(const std::vector<float> & priorities);

    // Panics (std::logic_error) if an invariant is broken. For tests.
    void check() const;

  private:
    struct Slot {
        uint64_t used    = 0; // clock of the last use
        uint64_t filled  = 0;
        uint32_t expert  = kNone;
        uint32_t pins    = 0;
        State    state   = State::Retired;
        bool     passing = false;
    };

    uint32_t victim(bool expected) const;
    uint32_t victim_for_prefetch() const;
    uint32_t spare() const;
    uint32_t fill(uint32_t slot, uint32_t expert, uint32_t * evicted);
    uint32_t empty_slot(uint32_t expert);
    void     vacate(uint32_t slot);

    std::vector<Slot>     slots_;
    std::vector<uint32_t> slot_of_;  // by expert
    std::vector<float>    priority_; // by expert
    std::vector<uint8_t>  expected_; // by expert
    std::vector<uint32_t> empty_;    // may hold stale entries; a slot is empty if its state says so
    uint32_t              n_slot_        = 0;
    uint32_t              n_ready_       = 0;
    uint32_t              n_filled_      = 0; // or being filled
    uint64_t              clock_         = 0;
    bool                  victim_passed_ = false;
};

} // namespace pye
