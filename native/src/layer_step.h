// The experts that one layer needs in one step, from look-up to unpinning: which are here, which are on their way, which
// wait for a slot. The expert FFN computes them group by group as they become resident.
#pragma once

#include "engine.h"
#include "row_groups.h"

#include <functional>
#include <vector>

namespace pye {

// An expert chosen in this step and how many (token, rank) pairs chose it.
struct Wanted {
    uint32_t expert;
    uint32_t pairs;
};

// The experts that any pair of a step has chosen, ascending.
void list_wanted(const RowGroups & groups, uint32_t n_expert, std::vector<Wanted> * wanted);

class LayerStep {
  public:
    // Under the engine's lock, which must be held until destruction. Counts hits and misses, pins what is resident, starts
    // loading what is not, as far as slots go: members of the set that are not computed yet are never victims. `elsewhere`
    // is shown those that are not here, also those on their way, and takes away those that need no slot.
    using Elsewhere = std::function<void(std::vector<Wanted> * missing)>;
    LayerStep(Engine & engine, uint32_t layer, const std::vector<Wanted> & wanted, const Elsewhere & elsewhere = {});
    ~LayerStep(); // waits for loads under way, unpins

    LayerStep(const LayerStep &)             = delete;
    LayerStep & operator=(const LayerStep &) = delete;

    bool all_resident() const { return waiting_.empty() && n_loading_ == 0; }
    // All of its layer's experts are needed, or nearly: those that were loaded for this step need not stay.
    void pass_on();
    // Whether experts of this step wait for slots that others of it hold.
    bool wants_slots() const { return !waiting_.empty(); }

    // The experts that can be computed now, in slot order, pinned. Blocks until there is one; empty when all are done.
    // Throws Error if a load failed, and if what is handed out holds all slots while others wait.
    std::vector<uint32_t> next();
    // Their kernels have finished: unpin, and use freed slots for experts that wait.
    void computed(const std::vector<uint32_t> & experts);

    uint32_t slot_of(uint32_t expert) const { return store_.slot_of(dense(expert)); }

  private:
    LayerStep(Engine & engine, uint32_t layer);

    uint32_t dense(uint32_t expert) const { return layer_.first + expert; }
    void     begin_loads();
    void     take(const DiskTier::Landed & landed);
    bool     claim(uint32_t expert);
    void     event(uint32_t layer, uint32_t expert, uint16_t kind, uint32_t pairs);

    Engine &              engine_;
    uint32_t              number_; // of the layer
    const ExpertLayer &   layer_;
    SlotStore &           store_;
    std::vector<uint32_t> ready_;   // resident and pinned, not handed out yet
    std::vector<uint32_t> out_;     // handed out
    std::vector<uint32_t> waiting_; // no slot yet, or that of a prefetch that was given up; most pairs last
    std::vector<uint32_t> adopted_; // prefetched, and waited for
    std::vector<uint32_t> loaded_;
    uint32_t              n_loading_ = 0;
    std::string           failure_;
};

} // namespace pye
