// Computes expert FFNs: the selected ids become slots, and the stock CPU kernels run on the slots. One object per stream
// (llama_context). Owns scratch memory and the walk over the graph; residency belongs to LayerStep.
#pragma once

#include "ffn_graph.h"
#include "layer_step.h"
#include "pass_graph.h"
#include "row_groups.h"

#include "ggml-backend.h"
#include "ggml-cpu.h"

#include <vector>

namespace pye {

class ExpertFfn {
  public:
    ExpertFfn();
    ~ExpertFfn();

    ExpertFfn(const ExpertFfn &)             = delete;
    ExpertFfn & operator=(const ExpertFfn &) = delete;

    void        set_n_threads(int n);
    void        set_abort_callback(ggml_abort_callback callback, void * data);
    ggml_status compute(ggml_cgraph * graph);

  private:
    struct Aborted {};

    void run_chain(ggml_cgraph * graph, const FfnChain & chain, int end);
    bool run_resident(ggml_cgraph * graph, const FfnChain & chain, int end, const LayerStep & step);
    void run_passes(ggml_cgraph * graph, const FfnChain & chain, int end, LayerStep & step, Multiply how, bool summed);
    void run_nodes(ggml_cgraph * graph, int begin, int end);
    void run(ggml_cgraph * graph);
    void add_up(const WeightedSum & sum);
    void look_ahead(const FfnChain & chain, const ggml_tensor * weights);
    std::vector<InputRows> input_rows(const FfnChain & chain, const ggml_tensor * last);

    ggml_backend_t      cpu_;
    ggml_abort_callback abort_      = nullptr;
    void *              abort_data_ = nullptr;
    Engine *            engine_     = nullptr; // of the graph being computed; its lock is held

    uint32_t layer_ = 0; // of the chain being computed

    // Reused from call to call, so that a step allocates nothing.
    std::vector<char>                                  tensors_; // ggml structs
    HostPassMemory                                     scratch_; // activations of a pass
    std::vector<char>                                  inputs_;  // copies of the FFN's inputs
    std::vector<int32_t>                               ids_;     // [n_tokens][n_used], expert ids
    std::vector<int32_t>                               slots_;   // same shape, slot ids
    std::vector<int32_t>                               row_of_;  // same shape, where a pair's row lies; empty: in order
    std::vector<float>                                 weights_; // same shape, of the weighted sum
    RowGroups                                          groups_;
    std::vector<Wanted>                                wanted_;
    std::vector<const float *>                         gate_inputs_; // [n_tokens], what the router read
    std::vector<FfnChain>                              chains_;
    std::vector<std::pair<ggml_tensor *, ggml_tensor>> saved_; // nodes as they were before run_resident
};

} // namespace pye
