// Where an expert's bytes come from: RAM, if the slots are a GPU's; its record in the bundle; else its tensors in the model's
// file. Starts loads into slots; does not know which slot is whose.
#pragma once

#include "bundle.h"
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

    // Takes the files over. `bundle` may be nullptr, and so may `ram`, which must outlive this, as `link` must.
    ExpertSource(const ExpertIndex & index, std::vector<platform::File> model_files, std::unique_ptr<Bundle> bundle,
                 Slots slots, RamTier * ram, Link * link);

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
    // A load of the expert has landed. If in good order, its record is sound, and later reads of it are not checked again,
    // which would take a core from the kernels.
    void landed(uint32_t layer, uint32_t expert, bool ok);
    // An expert has lost its slot to another.
    void evicted(uint32_t layer, uint32_t expert);
    // After a load has failed: true if there was another source and the load has begun again.
    bool load_again(uint32_t layer, uint32_t expert, uint32_t slot);

    const Bundle * bundle() const { return bundle_.get(); }
    DiskTier &     disk() { return *disk_; }

  private:
    uint64_t tag_of(uint32_t layer, uint32_t slot) const;
    void     place(uint64_t tag, uint32_t piece, const uint8_t * bytes); // on an I/O thread

    const ExpertIndex &       index_;
    std::unique_ptr<Bundle>   bundle_; // its file is the disk tier's last
    uint32_t                  bundle_file_;
    Slots                     slots_;
    RamTier *                 ram_;
    Link *                    link_;
    std::unique_ptr<DiskTier> disk_;
    bool                      preempt_ = true;
    // By layer and expert: its record has been read and found whole.
    std::vector<std::vector<uint8_t>> sound_;
};

} // namespace pye
