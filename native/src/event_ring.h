// The last events, oldest overwritten first. The engine's lock covers it.
#pragma once

#include "pyengine.h"

#include <algorithm>
#include <vector>

namespace pye {

class EventRing {
  public:
    explicit EventRing(size_t capacity) : ring_(capacity) {}

    void push(const pye_event & event) {
        ring_[(first_ + count_) % ring_.size()] = event;
        if (count_ < ring_.size()) {
            ++count_;
        } else {
            first_ = (first_ + 1) % ring_.size();
            ++lost_;
        }
    }

    size_t take(pye_event * out, size_t capacity) {
        const size_t n = std::min(capacity, count_);
        for (size_t i = 0; i < n; ++i) {
            out[i] = ring_[(first_ + i) % ring_.size()];
        }
        first_ = (first_ + n) % ring_.size();
        count_ -= n;
        return n;
    }

    uint64_t lost() const { return lost_; }

  private:
    std::vector<pye_event> ring_;
    size_t                 first_ = 0;
    size_t                 count_ = 0;
    uint64_t               lost_  = 0;
};

} // namespace pye
