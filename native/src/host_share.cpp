#include "host_share.h"

#include <algorithm>

namespace pye {

namespace {

constexpr uint32_t kFirst  = 4;   // measurements before the CPU's pace is known: threads start, pages are new
constexpr uint32_t kMemory = 16;  // measurements that count in the mean
constexpr uint32_t kAgain  = 512; // decisions after which a CPU that is never chosen is measured again
// What a step gains by the CPU must be more than what cutting the GPU's work there costs.
constexpr double kGain = 0.9;

} // namespace

size_t HostShare::how_many(const std::vector<uint32_t> & pairs, size_t n_coming, double link_ns) {
    if (n_threads_ == 0 || pairs.empty() || link_ns <= 0.0) {
        return 0;
    }
    if (n_measured_ < kFirst || ++n_asked_ >= kAgain) {
        n_asked_ = 0;
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
    if (++n_measured_ < kFirst) {
        return;
    }
    n_asked_         = 0;
    const double one = static_cast<double>(ns) / n_pair;
    ns_per_pair_ += (one - ns_per_pair_) / std::min(n_measured_ - kFirst + 1, kMemory);
}

} // namespace pye
