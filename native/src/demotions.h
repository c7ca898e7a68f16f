// What leaves VRAM on its way back to RAM: an expert's matrices are copied out of its slot one by one, each just before the
// next expert's matrix is written there. So nothing waits for a copy but the write that would destroy its source.
#pragma once

#include "expert_index.h"
#include "link.h"
#include "slot_memory.h"

#include <atomic>
#include <memory>
#include <vector>

namespace pye {

class Demotions {
  public:
    // `link`, which must outlive this, is that from VRAM to RAM.
    Demotions(const ExpertIndex & index, Link & link);

    // Under the engine's lock, before the slot's next load has begun: what is in it goes `to` host memory.
    void begin(uint32_t shape_class, uint32_t slot, uint32_t layer, uint32_t expert, uint8_t * to);
    // On the thread that is about to write this matrix into the slot.
    void before_write(uint32_t shape_class, uint32_t slot, const SlotMemory & slots, const ExpertMatrix & m);

    struct Ended {
        uint32_t layer, expert;
        bool     ok;
    };
    // Under the engine's lock, after the slot's load has ended and before it is given to another: copies what was not written
    // over. False: nothing was under way.
    bool end(uint32_t shape_class, uint32_t slot, const SlotMemory & slots, Ended * ended);

  private:
    struct Demotion {
        uint32_t              layer = 0, expert = 0;
        uint8_t *             to = nullptr; // nullptr: none under way
        std::atomic<uint32_t> copied{0};    // bits by place
        std::atomic<bool>     failed{false};
    };

    const ExpertIndex &                      index_;
    Link &                                   link_;
    std::vector<std::unique_ptr<Demotion[]>> by_slot_; // by class
};

} // namespace pye
