#include "layer_split.h"

#include <algorithm>

namespace pye {

std::vector<uint32_t> split_layers(const std::vector<float> & shares, uint32_t n_block, int32_t n_gpu_layers) {
    const int          n_layer = static_cast<int>(n_block) + 1; // and the output layer
    const int          on_gpu  = n_gpu_layers < 0 ? n_layer : std::min(n_gpu_layers, n_layer);
    std::vector<float> ends;
    float              sum = 0.0f;
    for (float share : shares) {
        sum += share;
        ends.push_back(sum);
    }
    for (float & end : ends) {
        end /= sum;
    }
    std::vector<uint32_t> gpu(n_block, 0);
    for (int block = n_layer - on_gpu; block < static_cast<int>(n_block); ++block) {
        const float at                  = static_cast<float>(block - (n_layer - on_gpu)) / static_cast<float>(on_gpu);
        const auto  of                  = std::upper_bound(ends.begin(), ends.end(), at) - ends.begin();
        gpu[static_cast<size_t>(block)] = static_cast<uint32_t>(of);
    }
    return gpu;
}

} // namespace pye
