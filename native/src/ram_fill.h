// Reads ahead into RAM: while the disk is idle and there are empty slots, a thread of its own asks for the experts of highest
// priority that are not there, a few at a time. Reading itself is the disk tier's, where everything else goes first.
#pragma once

#include "expert_source.h"

#include <atomic>
#include <mutex>
#include <thread>

namespace pye {

class RamFill {
  public:
    // `engine` is the engine's lock, which covers `source`; both must outlive this.
    RamFill(std::mutex & engine, ExpertSource & source);
    // Without the engine's lock: ends what is under way, within the time of a read.
    ~RamFill();

    RamFill(const RamFill &)             = delete;
    RamFill & operator=(const RamFill &) = delete;

  private:
    void run();

    std::mutex &      engine_;
    ExpertSource &    source_;
    std::atomic<bool> stop_{false};
    std::thread       thread_;
};

} // namespace pye
