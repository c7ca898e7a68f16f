#include "predictor.h"

#include <algorithm>
#include <numeric>

namespace pye {

namespace {

// Several sums side by side, which compilers turn into vector registers.
float dot(const float * a, const float * b, uint32_t n) {
    constexpr uint32_t kLanes       = 16;
    float              sums[kLanes] = {};
    uint32_t           i            = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (uint32_t j = 0; j < kLanes; ++j) {
            sums[j] += a[i + j] * b[i + j];
        }
    }
    float sum = std::accumulate(sums, sums + kLanes, 0.0f);
    for (; i < n; ++i) {
        sum += a[i] * b[i];
    }
    return sum;
}

void apply(const std::vector<float> & w, const std::vector<float> & b, const float * x, uint32_t n_in,
           std::vector<float> * out) {
    out->resize(b.size());
    for (uint32_t row = 0; row < b.size(); ++row) {
        (*out)[row] = b[row] + dot(w.data() + size_t(row) * n_in, x, n_in);
    }
}

} // namespace

const std::vector<uint32_t> & Predictor::guess(const float * x) {
    uint32_t n = n_in;
    if (n_hidden > 0) {
        apply(w1, b1, x, n_in, &hidden_);
        for (float & h : hidden_) {
            h = std::max(h, 0.0f);
        }
        x = hidden_.data();
        n = n_hidden;
    }
    apply(w2, b2, x, n, &scores_);
    for (float & s : scores_) {
        s = s == s ? s : 0.0f; // NaN has no place in an order
    }
    order_.resize(n_expert);
    std::iota(order_.begin(), order_.end(), 0u);
    const auto most = order_.begin() + std::min(take, n_expert);
    std::partial_sort(order_.begin(), most, order_.end(), [this](uint32_t a, uint32_t b) {
        return scores_[a] != scores_[b] ? scores_[a] > scores_[b] : a < b;
    });
    order_.erase(most, order_.end());
    return order_;
}

} // namespace pye
