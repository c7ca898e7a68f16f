// More experts of a layer than there are slots.
#include "gpu_stream.h"

#include "pass_graph.h"

namespace pye {

namespace {

constexpr size_t kMostActivations = 256u << 20; // of one pass

} // namespace

// More experts than there are slots: as many at a time as fit, all rows of each, as on the CPU.
void GpuStream::compute_in_passes(ggml_cgraph * graph, const FfnChain & chain, LayerStep & step) {
    size_t size = 0;
    for (int k = 0; k < chain.n_input; ++k) {
        size += Pieces::rounded(ggml_nelements(chain.inputs[k]) * sizeof(float));
    }
    inputs_.reserve(size);
    Pieces                 pieces(inputs_.base());
    std::vector<InputRows> inputs;
    // Copies, for the allocator may have given an input's memory to the result.
    {
        const ContextPtr ctx    = context_in(pass_tensors_, FfnChain::kMostInputs);
        ggml_cgraph *    copies = ggml_new_graph_custom(ctx.get(), FfnChain::kMostInputs, false);
        for (int k = 0; k < chain.n_input; ++k) {
            auto *        x    = const_cast<ggml_tensor *>(chain.inputs[k]);
            ggml_tensor * copy = ggml_cont(ctx.get(), x);
            copy->data         = pieces.take(ggml_nbytes(copy));
            copy->buffer       = inputs_.buffer();
            copy->flags |= GGML_TENSOR_FLAG_COMPUTE;
            ggml_graph_add_node(copies, copy);
            inputs.push_back({x, copy->data, x->ne[0] * sizeof(float), inputs_.buffer()});
        }
        submit(copies);
    }
    const SlotMemory & slots = *engine_->classes_[chain.layer().shape_class].memory;
    const size_t       row   = PassGraph::row_size(chain, graph, chain.end);
    for (std::vector<uint32_t> experts = step.next(); !experts.empty(); experts = step.next()) {
        for (size_t k = 0; k < experts.size();) {
            std::vector<uint32_t> some;
            for (size_t n_row = 0; k < experts.size(); ++k) {
                n_row += groups_.count(experts[k]);
                if (!some.empty() && n_row * row > kMostActivations) {
                    break;
                }
                some.push_back(experts[k]);
            }
            PassGraph pass(
                chain, slots, [&step](uint32_t e) { return step.slot_of(e); }, groups_, some, Multiply::ByRow,
                pass_tensors_, pass_, graph, chain.end);
            for (const InputRows & x : inputs) {
                pass.gather(x);
            }
            pass.compute(nullptr);
            pass.scatter();
            submit(pass.graph());
            ggml_backend_synchronize(gpu_.get()); // the slots may be given to others
            ++engine_->stats_.syncs;
            ++engine_->stats_.passes;
            step.computed(some);
        }
    }
}

} // namespace pye
