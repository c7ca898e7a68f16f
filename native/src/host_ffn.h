// Some experts of a layer on the CPU, from the RAM tier: a pass over their rows with the stock CPU kernels.
#pragma once

#include "ffn_graph.h"
#include "pass_memory.h"
#include "ram_tier.h"
#include "row_groups.h"

#include "ggml-backend.h"

#include <map>
#include <memory>
#include <vector>

namespace pye {

class HostFfn {
  public:
    HostFfn();

    // The chain's rows for all pairs of these experts, which are pinned in RAM, into `result`: [n_row][ne0] float32, by
    // expert in the order of the result, and by pair. `inputs`: the chain's inputs as they lie on the device, in host
    // memory. Returns the experts in that order. Throws Error.
    std::vector<uint32_t> compute(const FfnChain & chain, ggml_cgraph * graph, RamTier & ram, const RowGroups & groups,
                                  std::vector<uint32_t> experts, const std::vector<const char *> & inputs,
                                  char * result, int n_threads);

  private:
    struct Copy {
        const void *      of = nullptr;
        std::vector<char> bytes;
        ggml_tensor       tensor;
    };

    ggml_tensor * here(ggml_tensor * t);

    struct Free {
        void operator()(ggml_backend_t b) const { ggml_backend_free(b); }
    };
    std::unique_ptr<ggml_backend, Free> cpu_;
    std::vector<char>                   tensors_;
    HostPassMemory                      memory_;
    std::map<const ggml_tensor *, Copy> biases_; // of the model, on the device; where each was first met
};

} // namespace pye
