#include "host_ffn.h"

#include "error.h"
#include "pass_graph.h"

#include "ggml-backend-impl.h"
#include "ggml-cpu.h"

#include <algorithm>

namespace pye {

HostFfn::HostFfn() : cpu_(ggml_backend_cpu_init()) {}

std::vector<uint32_t> HostFfn::compute(const FfnChain & chain, ggml_cgraph * graph, RamTier & ram,
                                       const RowGroups & groups, std::vector<uint32_t> experts,
                                       const std::vector<const char *> & inputs, char * result, int n_threads) {
    const uint32_t layer   = chain.binding->layer;
    const auto     slot_of = [&](uint32_t expert) { return ram.slot_of(layer, expert); };
    std::sort(experts.begin(), experts.end(), [&](uint32_t a, uint32_t b) { return slot_of(a) < slot_of(b); });
    const RamSlots slots = ram.slots(layer);
    PassGraph      pass(chain, slots, slot_of, groups, experts, Multiply::ByRow, tensors_, memory_, graph, chain.end);
    pass.use_copies([this](ggml_tensor * t) { return here(t); });
    for (int k = 0; k < chain.n_input; ++k) {
        const ggml_tensor * x = chain.inputs[k];
        pass.gather({x, const_cast<char *>(inputs[static_cast<size_t>(k)]), x->ne[0] * sizeof(float)});
    }
    pass.compute(result);
    ggml_backend_cpu_set_n_threads(cpu_.get(), n_threads);
    if (ggml_backend_graph_compute(cpu_.get(), pass.graph()) != GGML_STATUS_SUCCESS) {
        throw Error(PYE_E_MEMORY, "the CPU could not compute experts (out of memory?)");
    }
    return experts;
}

// A bias lies where its layer does, on the device; it is small, and never changes.
ggml_tensor * HostFfn::here(ggml_tensor * t) {
    if (t->buffer == nullptr || ggml_backend_buffer_is_host(t->buffer)) {
        return t;
    }
    Copy & copy = biases_[t];
    if (copy.of != t->data) {
        copy.bytes.resize(ggml_nbytes(t));
        ggml_backend_tensor_get(t, copy.bytes.data(), 0, copy.bytes.size());
        copy.tensor        = *t;
        copy.tensor.data   = copy.bytes.data();
        copy.tensor.buffer = nullptr;
        copy.tensor.extra  = nullptr;
        copy.of            = t->data;
    }
    return &copy.tensor;
}

} // namespace pye
