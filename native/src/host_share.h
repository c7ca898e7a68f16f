// Of the experts that a step misses in VRAM and finds in RAM: which are moved, and which are computed by the CPU where they
// are, at the same time (HybriMoE's scheduling, Fiddler's choice). Both costs are measured while running: what the link
// moves while it is busy, and what the CPU needs for a (token, rank) pair.
//
// The engine's lock covers it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace pye {

class HostShare {
  public:
    HostShare();

    // Threads that compute; 0: everything is moved.
    void set_threads(int n) { n_threads_ = n; }
    int  threads() const { return n_threads_; }

    struct Missing {
        uint32_t expert;
        uint32_t pairs;  // (token, rank) pairs that chose the expert
        float    unread; // the part of it that the link has still to move, 0..1
    };

    // Whether the CPU shall compute an expert now to see how long it takes; what comes out is not used, so that a GPU
    // which the CPU never helps gives the same bits in every run.
    bool trial_due();
    // How many of the missing, in the order in which the CPU would take them, it computes: the first ones. The link moves the
    // rest and as much as `others` experts besides, and takes `link_ns` for one.
    size_t how_many(const std::vector<Missing> & missing, double others, double link_ns) const;
    // So many pairs took so long.
    void computed(uint32_t n_pair, uint64_t ns);

    double ns_per_pair() const { return ns_per_pair_; }

  private:
    int      n_threads_   = 0;
    double   ns_per_pair_ = 0.0;
    uint32_t n_trial_     = 0; // measurements of the trial under way
    uint32_t again_;
    uint32_t n_asked_ = 0; // decisions since the CPU last computed
};

} // namespace pye
