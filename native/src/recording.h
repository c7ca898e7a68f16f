// What routers saw and chose, token by token, for traces. Off unless asked for; the engine's lock covers it.
#pragma once

#include "ggml.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace pye {

class Recording {
  public:
    // Rows not taken yet are forgotten. `inputs` only together with `ids`.
    void set(bool ids, bool inputs, size_t n_used, size_t n_in) {
        on_     = ids;
        n_used_ = n_used;
        n_in_   = inputs ? n_in : 0;
        n_row_  = 0;
        ids_.clear();
        weights_.clear();
        inputs_.clear();
    }

    bool on() const { return on_; }

    // One layer of one token. `weights` may be nullptr. When nobody takes them, later rows are not kept.
    void add(const int32_t * ids, const float * weights, const float * x) {
        if (n_row_ == kMostRows) {
            return;
        }
        ++n_row_;
        for (size_t i = 0; i < n_used_; ++i) {
            ids_.push_back(static_cast<uint16_t>(ids[i]));
            weights_.push_back(ggml_fp32_to_fp16(weights != nullptr ? weights[i] : 0.0f));
        }
        for (size_t i = 0; i < n_in_; ++i) {
            inputs_.push_back(ggml_fp32_to_fp16(x[i]));
        }
    }

    // The oldest rows, up to `capacity`; returns how many. Each array may be nullptr.
    size_t take(uint16_t * ids, uint16_t * weights, uint16_t * inputs, size_t capacity) {
        const size_t n = std::min(capacity, n_row_);
        give(ids_, n * n_used_, ids);
        give(weights_, n * n_used_, weights);
        give(inputs_, n * n_in_, inputs);
        n_row_ -= n;
        return n;
    }

  private:
    static constexpr size_t kMostRows = 1 << 14;

    static void give(std::vector<uint16_t> & from, size_t n, uint16_t * to) {
        if (to != nullptr) {
            std::copy_n(from.begin(), n, to);
        }
        from.erase(from.begin(), from.begin() + static_cast<std::ptrdiff_t>(n));
    }

    bool                  on_     = false;
    size_t                n_used_ = 0, n_in_ = 0, n_row_ = 0;
    std::vector<uint16_t> ids_, weights_, inputs_;
};

} // namespace pye
