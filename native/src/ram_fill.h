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

    // Under the engine's lock: whether nothing was left to read when it last looked, so that it looks no more.
    bool ended() const { return ended_; }

  private:
    void run();

    std::mutex &      engine_;
    ExpertSource &    source_;
    std::atomic<bool> stop_{false};
    bool              ended_ = false;
    std::thread       thread_; // last: it uses the others
};

} // namespace pye
