// The (token, rank) pairs of a step grouped by the expert that computes them. Knows ids only: neither slots nor budget, so
// that whatever is derived from it is the same at every budget.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace pye {

class RowGroups {
  public:
    // A pair is its index in `ids` ([n_tokens][n_used]). Every id is below n_expert.
    void assign(const std::vector<int32_t> & ids, uint32_t n_expert) {
        begin_.assign(n_expert + 1, 0);
        for (int32_t id : ids) {
            ++begin_[static_cast<uint32_t>(id) + 1];
        }
        for (uint32_t e = 0; e < n_expert; ++e) {
            begin_[e + 1] += begin_[e];
        }
        pairs_.resize(ids.size());
        next_.assign(begin_.begin(), begin_.end() - 1);
        for (size_t i = 0; i < ids.size(); ++i) {
            pairs_[next_[static_cast<uint32_t>(ids[i])]++] = static_cast<int32_t>(i);
        }
    }

    uint32_t count(uint32_t expert) const { return begin_[expert + 1] - begin_[expert]; }
    // The expert's pairs, count() of them, ascending.
    const int32_t * pairs(uint32_t expert) const { return pairs_.data() + begin_[expert]; }

  private:
    std::vector<uint32_t> begin_; // by expert, and the end of the last
    std::vector<uint32_t> next_;
    std::vector<int32_t>  pairs_;
};

} // namespace pye
