// When what happened, for pictures. Off unless asked for; the engine's lock covers it.
#pragma once

#include "pyengine.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <deque>

namespace pye {

class Timeline {
  public:
    using Time = std::chrono::steady_clock::time_point;

    static constexpr uint32_t kNoExpert = 0xffff;
    enum Flags : uint16_t { None = 0, GivenUp = 1, Adopted = 2 };

    void set(bool on) {
        on_    = on;
        start_ = std::chrono::steady_clock::now();
        spans_.clear();
    }
    bool on() const { return on_; }

    void add(uint16_t kind, uint32_t layer, uint32_t expert, Time begin, Time end, uint16_t flags = None) {
        if (!on_ || end < start_) {
            return;
        }
        if (spans_.size() == kMost) {
            spans_.pop_front();
        }
        spans_.push_back({since_start(begin), since_start(end), kind, static_cast<uint16_t>(layer),
                          static_cast<uint16_t>(expert), flags});
    }
    void until_now(uint16_t kind, uint32_t layer, Time begin) {
        if (on_) {
            add(kind, layer, kNoExpert, begin, std::chrono::steady_clock::now());
        }
    }

    size_t take(pye_span * out, size_t capacity) {
        const size_t n = std::min(capacity, spans_.size());
        std::copy_n(spans_.begin(), n, out);
        spans_.erase(spans_.begin(), spans_.begin() + static_cast<std::ptrdiff_t>(n));
        return n;
    }

  private:
    static constexpr size_t kMost = 1 << 16;

    uint64_t since_start(Time t) const {
        return t < start_
                   ? 0
                   : static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(t - start_).count());
    }

    bool                 on_ = false;
    Time                 start_;
    std::deque<pye_span> spans_;
};

} // namespace pye
