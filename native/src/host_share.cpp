#include "host_share.h"

#include <algorithm>

namespace pye {

namespace {

// A trial is so many steps, one behind the other, in which the CPU computes one expert; the fastest counts. Threads that have
// slept and memory that nobody has touched make the first of them ten times slower than the CPU is when it is used.
constexpr uint32_t kTrial  = 8;
constexpr uint32_t kAgain  = 4096; // decisions after which a CPU that is never chosen is tried again
constexpr double   kMemory = 16.0; // measurements that count in the mean
// What a step gains by the CPU must be more than what cutting the GPU's work there costs.
constexpr double kGain = 0.9;

} // namespace

size_t HostShare::how_many(const std::vector<uint32_t> & pairs, size_t n_coming, double link_ns) {
    if (n_threads_ == 0 || pairs.empty() || link_ns <= 0.0) {
        return 0;
    }
    if (++n_asked_ >= kAgain) {
        n_asked_ = 0;
        n_trial_ = 0;
        fastest_ = 0.0;
    }
    if (n_trial_ < kTrial) {
        return 1;
    }
    const auto moving = [&](size_t n) { return static_cast<double>(n_coming + n) * link_ns; };
    size_t     best   = 0;
    double     least  = moving(pairs.size()) * kGain;
    double     here   = 0.0;
    for (size_t n = 1; n <= pairs.size(); ++n) {
        here += pairs[n - 1] * ns_per_pair_;
        const double both = std::max(here, moving(pairs.size() - n));
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
        fastest_     = n_trial_ == 0 ? one : std::min(fastest_, one);
        ns_per_pair_ = fastest_;
        ++n_trial_;
        return;
    }
    n_asked_ = 0;
    ns_per_pair_ += (one - ns_per_pair_) / kMemory;
}

} // namespace pye
