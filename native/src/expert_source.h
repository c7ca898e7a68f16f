// Where an expert's bytes come from: RAM, if the slots are a GPU's; its record in the bundle; else its tensors in the model's
// file. Starts loads into slots, and lets what leaves a GPU's slot fall back to RAM; does not know which slot is whose.
#pragma once

#include "bundle.h"
#include "demotions.h"
#include "disk_tier.h"
#include "expert_index.h"
#include "link.h"
#include "ram_tier.h"
#include "slot_memory.h"

#include <functional>
#include <memory>
#include <vector>

namespace pye {

class ExpertSource {
  public:
    using Slots = std::function<SlotMemory &(uint32_t shape_class)>;

    // Takes the files over. `bundle` may be nullptr, and so may `ram`, and with it the links to and from VRAM; all three must
    // outlive this.
    ExpertSource(const ExpertIndex & index, std::vector<platform::File> model_files, std::unique_ptr<Bundle> bundle,
                 Slots slots, RamTier * ram, Link * link, Link * back);

    // Whether demand loads go before prefetches, which are read in small pieces for their sake. Off in ablations.
    void set_preemption(bool on) { preempt_ = on; }
    // Begin to fill a slot; the load's tag carries slot and shape class.
    void            load_begin(uint32_t layer, uint32_t expert, uint32_t slot, Urgency urgency = Urgency::Demand);
    static uint32_t slot_of(const DiskTier::Landed & landed) { return static_cast<uint32_t>(landed.tag); }
    static uint32_t class_of(const DiskTier::Landed & landed);
    // Of the load of a slot that is under way: see DiskTier.
    void  promote(uint32_t layer, uint32_t slot);
    void  cancel(uint32_t layer, uint32_t slot);
    float unread(uint32_t layer, uint32_t slot);
    // A load of the expert into this slot has ended; the slot is still its own. If in good order, its record is sound, and later reads of it are not checked again,
    // which would take a core from the kernels.
    void landed(uint32_t layer, uint32_t expert, uint32_t slot, bool ok);
    // An expert has lost its slot to another, whose load begins next. `passes`: see RamTier::claim_for_demotion.
    void evicted(uint32_t layer, uint32_t expert, uint32_t slot, bool passes);
    // All slots of a class have been emptied.
    void emptied(uint32_t shape_class);
    // After a load has failed: true if there was another source and the load has begun again.
    bool load_again(uint32_t layer, uint32_t expert, uint32_t slot);

    // Begin to read an expert into an empty slot in RAM; false: there is none, or nobody to read.
    bool fill_begin();
    void settle_fills(); // what has been read is there from now on
    void end_fills();    // none is under way afterwards, until one begins

    struct Counters {
        uint64_t demotions = 0, fills = 0;
    };
    const Counters & counters() const { return counters_; }

    const Bundle * bundle() const { return bundle_.get(); }
    DiskTier &     disk() { return *disk_; }

  private:
    uint64_t tag_of(uint32_t layer, uint32_t slot) const;
    void     demote(uint32_t shape_class, uint32_t slot);
    void     fill_landed(const DiskTier::Landed & landed);
    // Reads of an expert's record or matrices, to `room` if that is not nullptr. With `small_pieces`, what is not needed at once
    // is read in pieces that others need not wait for long for.
    std::vector<Read> reads(uint32_t layer, uint32_t expert, uint8_t * room, bool small_pieces, Whole * whole);
    void              place(uint64_t tag, uint32_t piece, const uint8_t * bytes); // on an I/O thread

    const ExpertIndex &        index_;
    std::unique_ptr<Bundle>    bundle_; // its file is the disk tier's last
    uint32_t                   bundle_file_;
    Slots                      slots_;
    RamTier *                  ram_;
    Link *                     link_;
    std::unique_ptr<Demotions> demotions_; // with `ram_`
    struct Leaving {
        uint32_t layer = 0, expert = 0, slot = UINT32_MAX;
        bool     passes = false;
    };
    Leaving leaving_; // evicted, and the load of its slot has not begun
    // What a load of a slot in VRAM does with RAM: goes past it, comes from there, leaves a copy there.
    enum class Way : uint8_t { Past, From, Through };
    std::vector<std::vector<Way>>     ways_;       // by class and slot
    std::vector<std::vector<uint8_t>> unfillable_; // by layer and expert: could not be read ahead
    Counters                          counters_;
    std::unique_ptr<DiskTier>         disk_;
    bool                              preempt_ = true;
    // By layer and expert: its record has been read and found whole.
    std::vector<std::vector<uint8_t>> sound_;
};

} // namespace pye
