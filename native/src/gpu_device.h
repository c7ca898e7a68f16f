// The proxy of a GPU: a ggml device that forwards everything to the GPU's own, except multiplications by our expert tensors,
// which its streams compute from slots (gpu_stream.h). llama.cpp is given it in the place of the GPU, and so hands over whole
// graphs: attention, router and experts are one run of kernels on one stream, and none of them is ours.
#pragma once

#include "ggml-backend-impl.h"

namespace pye {

// The proxy of this device, made once and never freed: models and contexts point at it. Those of a higher number are further
// devices with memory of their own, which only a CPU can play: several GPUs where there is none.
ggml_backend_dev_t gpu_proxy(ggml_backend_dev_t gpu, uint32_t number);

} // namespace pye
