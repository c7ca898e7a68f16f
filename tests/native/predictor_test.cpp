#include "predictor.h"

#include "check.h"

#include <limits>

using pye::Predictor;

namespace {

// Scores are the inputs themselves, shifted.
Predictor identity(uint32_t n, std::vector<float> shift) {
    Predictor p;
    p.n_in = p.n_expert = n;
    p.take              = n;
    p.w2.assign(size_t(n) * n, 0.0f);
    for (uint32_t i = 0; i < n; ++i) {
        p.w2[i * n + i] = 1.0f;
    }
    p.b2 = std::move(shift);
    return p;
}

} // namespace

TEST(the_highest_scores_come_first_and_equal_ones_in_order) {
    Predictor   p   = identity(4, {0, 0, 0.5f, 0});
    const float x[] = {1, 3, 2.5f, -1};
    CHECK(p.guess(x) == (std::vector<uint32_t>{1, 2, 0, 3}));
    p.take = 2;
    CHECK(p.guess(x) == (std::vector<uint32_t>{1, 2}));
    p.take = 9;
    CHECK_EQUAL(p.guess(x).size(), 4u);
}

TEST(widths_that_no_vector_divides) {
    for (uint32_t n : {1u, 15u, 16u, 17u, 40u}) {
        Predictor p;
        p.n_in     = n;
        p.n_expert = 2;
        p.take     = 1;
        p.w2.assign(2 * n, 1.0f);
        p.w2[2 * n - 1] = 1.5f; // the last input decides
        p.b2.assign(2, 0.0f);
        std::vector<float> x(n, 1.0f);
        CHECK_EQUAL(p.guess(x.data())[0], 1u);
        x[n - 1] = -1.0f;
        CHECK_EQUAL(p.guess(x.data())[0], 0u);
    }
}

TEST(two_matrices_with_a_relu_between) {
    // hidden = relu(x - 1), relu(1 - x): scores are |x - 1| and 0.5.
    Predictor p;
    p.n_in     = 1;
    p.n_hidden = 2;
    p.n_expert = 2;
    p.take     = 1;
    p.w1       = {1, -1};
    p.b1       = {-1, 1};
    p.w2       = {1, 1, 0, 0};
    p.b2       = {0, 0.5f};
    for (const auto & [x, first] : std::vector<std::pair<float, uint32_t>>{{0, 0}, {1, 1}, {1.2f, 1}, {2, 0}}) {
        CHECK_EQUAL(p.guess(&x)[0], first);
    }
}

TEST(numbers_that_are_none_do_no_harm) {
    Predictor   p   = identity(3, {0, 0, 0});
    const float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
    const float x[] = {nan, inf, 1};
    CHECK_EQUAL(p.guess(x).size(), 3u);
}
