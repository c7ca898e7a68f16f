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
    // Tokens not taken yet are forgotten. `inputs` only together with `ids`.
    void set(bool ids, bool inputs, size_t n_layer, size_t n_used, size_t n_in) {
        on_      = ids;
        n_layer_ = n_layer;
        n_used_  = n_used;
        n_in_    = inputs ? n_in : 0;
        n_token_ = 0;
        last_    = kNone;
        ids_.clear();
        weights_.clear();
        inputs_.clear();
    }

    bool on() const { return on_; }
    bool wants_inputs() const { return on_ && n_in_ > 0; }

    // One layer of one token. `weights` may be nullptr. Layers come in ascending order from the first; one that comes again
    // belongs to the same token (its matrices are computed apart) unless there is no other. When nobody takes them, later
    // tokens are not kept.
    void add(size_t layer, const int32_t * ids, const float * weights, const float * x) {
        if (layer == 0 && (last_ != 0 || n_layer_ == 1)) {
            begin_token();
        } else if (last_ == kNone || layer <= last_) {
            return;
        }
        last_    = layer;
        deepest_ = std::max(deepest_, layer);
        if (n_token_ > kMostTokens) {
            return;
        }
        const size_t row = (n_token_ - 1) * n_layer_ + layer;
        for (size_t i = 0; i < n_used_; ++i) {
            ids_[row * n_used_ + i]     = static_cast<uint16_t>(ids[i]);
            weights_[row * n_used_ + i] = ggml_fp32_to_fp16(weights != nullptr ? weights[i] : 0.0f);
        }
        for (size_t i = 0; i < n_in_; ++i) {
            inputs_[row * n_in_ + i] = ggml_fp32_to_fp16(x[i]);
        }
    }

    // A layer of several tokens. Its later layers may have one: llama.cpp drops those without output before the last.
    void several() {
        drop_unfinished();
        last_ = kNone;
    }

    // The last token has no output that anybody wants, so its last layer was not computed: it is none of those to keep.
    void without_output() {
        if (last_ != kNone) {
            --n_token_;
            resize(std::min(n_token_, kMostTokens));
        }
        last_ = kNone;
    }

    // The oldest tokens, up to `capacity`; returns how many. Each array may be nullptr. Only between two computations.
    size_t take(uint16_t * ids, uint16_t * weights, uint16_t * inputs, size_t capacity) {
        several();
        n_token_       = std::min(n_token_, kMostTokens);
        const size_t n = std::min(capacity, n_token_);
        give(ids_, n * n_layer_ * n_used_, ids);
        give(weights_, n * n_layer_ * n_used_, weights);
        give(inputs_, n * n_layer_ * n_in_, inputs);
        n_token_ -= n;
        return n;
    }

  private:
    static constexpr size_t kMostTokens = 256;
    static constexpr size_t kNone       = SIZE_MAX;

    void begin_token() {
        drop_unfinished();
        ++n_token_;
        resize(std::min(n_token_, kMostTokens));
    }
    // A computation that ended in the middle of a token. Some models have layers that are never computed, so the end is where
    // the deepest token ended.
    void drop_unfinished() {
        if (last_ != kNone && last_ < deepest_) {
            --n_token_;
            resize(std::min(n_token_, kMostTokens));
        }
    }
    void resize(size_t n_token) {
        ids_.resize(n_token * n_layer_ * n_used_);
        weights_.resize(n_token * n_layer_ * n_used_);
        inputs_.resize(n_token * n_layer_ * n_in_);
    }

    static void give(std::vector<uint16_t> & from, size_t n, uint16_t * to) {
        if (to != nullptr) {
            std::copy_n(from.begin(), n, to);
        }
        from.erase(from.begin(), from.begin() + static_cast<std::ptrdiff_t>(n));
    }

    bool                  on_      = false;
    size_t                n_layer_ = 0, n_used_ = 0, n_in_ = 0, n_token_ = 0;
    size_t                last_ = kNone, deepest_ = 0; // layers
    std::vector<uint16_t> ids_, weights_, inputs_;
};

} // namespace pye
