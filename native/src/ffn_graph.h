// Recognises expert FFNs in llama.cpp's graphs. Knows shapes of graphs, not residency.
#pragma once

#include "buffer.h"

#include "ggml.h"

#include <vector>

namespace pye {

// Whether a node is part of an expert FFN on our tensors: the multiplications, and what lies between and after them up to
// the weighted sum. Claiming these too makes the whole FFN one split of the scheduler.
bool belongs_to_expert_ffn(const ggml_tensor * node);

// A multiplication by one of our matrices: MUL_MAT_ID(weight, x, ids).
bool is_expert_matmul(const ggml_tensor * node);

// A run of nodes [begin, end) of a graph that can be computed for any subset of (token, rank) pairs: it starts and ends
// with a multiplication by one layer's matrices, and everything between works row by row.
struct FfnChain {
    static constexpr int kMostInputs = 4;

    int                 begin               = 0;
    int                 end                 = 0;
    const Binding *     binding             = nullptr;
    const ggml_tensor * ids                 = nullptr; // [n_used, n_tokens], int32
    const ggml_tensor * inputs[kMostInputs] = {};      // activations from outside, [n, 1 or n_used, n_tokens]
    int                 n_input             = 0;
    ggml_tensor *       gate = nullptr; // gate and up where they may be one multiplication; they are then the
    ggml_tensor *       up   = nullptr; // chain's first two nodes, in either order

    const ExpertLayer & layer() const { return binding->engine->index().layers[binding->layer]; }
    int64_t             n_used() const { return ids->ne[0]; }
    int64_t             n_tokens() const { return ids->ne[1]; }
};

// The end of an FFN: every row times its routing weight, summed over ranks. Nodes [begin, end) of the graph.
struct WeightedSum {
    int                 begin   = 0;
    const ggml_tensor * rows    = nullptr; // [n, n_used, n_tokens], float32
    const ggml_tensor * weights = nullptr; // [1, n_used, n_tokens], float32
    ggml_tensor *       out     = nullptr; // [n, n_tokens], float32
};

// Whether nodes [.., end) from some node at or after `begin` on are exactly one weighted sum that can be computed in one go.
bool find_weighted_sum(ggml_cgraph * graph, int begin, int end, WeightedSum * sum);

// Whether the sum alone reads the chain's rows, with nothing but biases between: then they may lie in any order.
bool sums_rows_of(const WeightedSum & sum, ggml_cgraph * graph, const FfnChain & chain);

// The sum for some tokens at a time: the same operations in the same order as the graph's own nodes, each rounded as they
// are, so bit-identical to them.
struct RankSum {
    const WeightedSum & sum;
    const float *       weights; // [n_tokens][n_used]
    const int32_t *     row_of;  // [n_tokens][n_used], which of the rows; null: they are in order

    void compute(int64_t first_token, int64_t last_token) const;
};

// Whether two tensors share memory.
bool overlap(const ggml_tensor * a, const ggml_tensor * b);

// What a chain's router has chosen, [n_tokens][n_used], from where it lies as in chain.ids.
void read_ids(const FfnChain & chain, const void * from, std::vector<int32_t> * ids);

// Whose experts a graph needs; nullptr: nobody's.
Engine * engine_of(ggml_cgraph * graph);

// The chains of a graph in order, into a vector that the caller keeps: this runs for every layer of every token.
// Throws Error(PYE_E_UNSUPPORTED) if a multiplication has a form that no pass can compute.
void find_chains(ggml_cgraph * graph, std::vector<FfnChain> * chains);

} // namespace pye
