// Scores for the experts of a later layer from the gate input of an earlier one: data from outside, one matrix or two with a
// ReLU between. A guess costs microseconds and is never a promise.
#pragma once

#include <cstdint>
#include <vector>

namespace pye {

struct Predictor {
    uint32_t           source = 0; // layer whose gate input it reads
    uint32_t           target = 0; // later layer whose experts it scores
    uint32_t           n_in = 0, n_hidden = 0, n_expert = 0;
    std::vector<float> w1, b1;   // [n_hidden][n_in], [n_hidden]; empty if n_hidden is 0
    std::vector<float> w2, b2;   // [n_expert][n_hidden or n_in], [n_expert]
    uint32_t           take = 0; // of the highest scores, how many are guesses
    std::vector<float> chances;  // of guesses about absent experts, by rank, as measured before; may be empty

    // The `take` experts with the highest scores, highest first. `x`: [n_in].
    const std::vector<uint32_t> & guess(const float * x);

  private:
    std::vector<float>    hidden_, scores_;
    std::vector<uint32_t> order_;
};

} // namespace pye
