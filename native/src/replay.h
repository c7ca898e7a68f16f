// Expert ids from a recorded trace in the place of the router's, for benchmarks of movement with random weights.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace pye {

class Replay {
  public:
    // `ids` is [n_step][n_layer][n_used]; none ends the replay.
    void set(std::vector<int32_t> ids, size_t n_layer, size_t n_used) {
        ids_    = std::move(ids);
        n_used_ = n_used;
        at_.assign(n_layer, 0);
    }

    // The ids of one layer's step, [n_token][n_used], are exchanged for the next ones of the trace.
    void apply(uint32_t layer, std::vector<int32_t> * ids) {
        if (ids_.empty()) {
            return;
        }
        const size_t n_step = ids_.size() / (at_.size() * n_used_);
        for (size_t i = 0; i + n_used_ <= ids->size(); i += n_used_) {
            const size_t from = (at_[layer]++ % n_step * at_.size() + layer) * n_used_;
            std::copy_n(ids_.begin() + static_cast<std::ptrdiff_t>(from), n_used_,
                        ids->begin() + static_cast<std::ptrdiff_t>(i));
        }
    }

    bool active() const { return !ids_.empty(); }

    // The ids that a layer will be given next.
    std::vector<int32_t> next(uint32_t layer) const {
        const size_t n_step = ids_.size() / (at_.size() * n_used_);
        const auto   from   = static_cast<std::ptrdiff_t>((at_[layer] % n_step * at_.size() + layer) * n_used_);
        return {ids_.begin() + from, ids_.begin() + from + static_cast<std::ptrdiff_t>(n_used_)};
    }

  private:
    std::vector<int32_t> ids_;
    std::vector<size_t>  at_; // by layer, steps taken
    size_t               n_used_ = 0;
};

} // namespace pye
