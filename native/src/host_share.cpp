#include "host_share.h"

#include <algorithm>

namespace pye {

namespace {

// A trial is so many steps, one behind the other, in which the CPU computes one expert; the last ones count. While threads
// wake up it is ten times slower than it is once it computes in every step.
constexpr uint32_t kTrial = 16, kCounts = 8;
// Decisions after which a CPU that is not chosen is tried again, in case others kept it busy; twice as many each time.
constexpr uint32_t kAgain = 128, kLastAgain = 16384;
constexpr double   kMemory = 32.0; // measurements that count in the mean
// What a step gains by the CPU must be more than what cutting the GPU's work there costs. Where the link moves an expert
// faster than the CPU computes it nothing was won with this (0.95 to 1.02 of moving everything), so nothing is shared there.
constexpr double kGain = 0.75;

} // namespace

HostShare::HostShare() : again_(kAgain) {}

bool HostShare::trial_due() {
    if (n_threads_ > 0 && n_trial_ == kTrial && ++n_asked_ >= again_) {
        again_   = std::min(2 * again_, kLastAgain);
        n_asked_ = 0;
        n_trial_ = 0;
    }
    return n_threads_ > 0 && n_trial_ < kTrial;
}

size_t HostShare::how_many(const std::vector<Missing> & missing, double others, double link_ns) const {
    if (n_threads_ == 0 || n_trial_ < kTrial || ns_per_pair_ >= link_ns) {
        return 0;
    }
    double moving = others * link_ns;
    for (const Missing & m : missing) {
        moving += m.unread * link_ns;
    }
    size_t best  = 0;
    double least = moving * kGain;
    double here  = 0.0;
    for (size_t n = 1; n <= missing.size(); ++n) {
        here += missing[n - 1].pairs * ns_per_pair_;
        moving -= missing[n - 1].unread * link_ns;
        const double both = std::max(here, moving);
        if (both < least) {
            least = both;
            best  = n;
        }
    }
    return best;
}

void HostShare::computed(uint32_t n_pair, uint64_t ns) {
    const double one = static_cast<double>(ns) / n_pair;
    if (n_trial_ < kTrial) {
        const uint32_t n = ++n_trial_ + kCounts - kTrial; // that count, this one included
        ns_per_pair_     = n_trial_ <= kTrial - kCounts ? 0.0 : ns_per_pair_ + (one - ns_per_pair_) / n;
        return;
    }
    again_   = kAgain;
    n_asked_ = 0;
    ns_per_pair_ += (one - ns_per_pair_) / kMemory;
}

} // namespace pye
