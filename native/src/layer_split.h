// Which of several GPUs computes which layer.
#pragma once

#include <cstdint>
#include <vector>

namespace pye {

// By block: the number of the GPU that llama.cpp's split mode "layer" puts it on (llama_model::load_tensors), in the same
// arithmetic. `shares` are not negative and not all zero; `n_gpu_layers` counts from the end, the output layer included; below
// zero all. Blocks that llama.cpp leaves to the CPU are the first GPU's: somebody must have their experts.
std::vector<uint32_t> split_layers(const std::vector<float> & shares, uint32_t n_block, int32_t n_gpu_layers);

} // namespace pye
