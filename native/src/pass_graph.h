// One pass of an expert FFN as a graph for the stock kernels: the chain's nodes on compact rows, those of the
// (token, rank) pairs of some resident experts.
#pragma once

#include "ffn_graph.h"
#include "pass_memory.h"
#include "row_groups.h"
#include "scratch.h"
#include "slot_memory.h"

#include <functional>
#include <utility>
#include <vector>

namespace pye {

// How rows meet their experts' matrices.
enum class Multiply {
    ByRow,    // one MUL_MAT_ID: matrix times vector for every row, the kernels that stock llama.cpp runs
    ByExpert, // a MUL_MAT for every expert on its rows, which lie one behind the other: matrix times matrix
};

// A chain's input as a matrix of rows: of one row for each token, or for each pair.
struct InputRows {
    const ggml_tensor * x;
    void *              data;
    size_t              stride; // bytes from row to row
    // What the rows lie in; nullptr: ordinary memory.
    ggml_backend_buffer_t buffer = nullptr;
};

class PassGraph {
  public:
    // Rows are in the order of `experts`, and of pairs within each. ByRow: experts in slot order. The two memories are
    // kept by the caller from pass to pass, and must outlive the graph.
    // Where `slot_of` says, in `slots`.
    PassGraph(const FfnChain & chain, const SlotMemory & slots, const std::function<uint32_t(uint32_t)> & slot_of,
              const RowGroups & groups, const std::vector<uint32_t> & experts, Multiply how,
              std::vector<char> & tensors, PassMemory & memory, ggml_cgraph * theirs, int end);

    PassGraph(const PassGraph &)             = delete;
    PassGraph & operator=(const PassGraph &) = delete;

    int64_t n_rows() const { return n_row_; }

    // Before anything is added: biases are read from what this gives for them.
    void use_copies(std::function<ggml_tensor *(ggml_tensor *)> copy_of) { copy_of_ = std::move(copy_of); }

    void gather(const InputRows & input);
    // The chain's nodes and those behind it, up to `end`. The last one's rows go to `result`, in the pass's order, or into
    // scratch memory if that is null.
    void compute(void * result);
    // The last node's rows to where llama.cpp's graph has them.
    void scatter();

    ggml_cgraph * graph() const { return graph_; }

    // Bytes of activations for each row of a pass.
    static size_t row_size(const FfnChain & chain, ggml_cgraph * theirs, int end);

  private:
    ggml_tensor * here(const ggml_tensor * t) const;
    ggml_tensor * ids(const int32_t * values);
    ggml_tensor * with_data(ggml_tensor * t, const void * data) const;
    // `t` in the buffer of `other`, whose memory it shares.
    static ggml_tensor * beside(ggml_tensor * t, const ggml_tensor * other);
    void                 add(ggml_tensor * t);
    ggml_tensor *        multiply(const ggml_tensor * like, uint32_t place, bool pair, void * result);
    ggml_tensor *        same_operation(const ggml_tensor * t);

    const FfnChain &                        chain_;
    const SlotMemory &                      slots_;
    PassMemory &                            memory_;
    const std::function<uint32_t(uint32_t)> slot_of_;
    const RowGroups &                       groups_;
    const std::vector<uint32_t> &           experts_;
    const Multiply                          how_;
    ggml_cgraph * const                     theirs_;
    const int                               end_;
    const bool one_; // token: ranks stay ranks, else every pair becomes a token of one rank
    int64_t    n_row_ = 0, n1_ = 0, n2_ = 0;
    uint32_t   lowest_ = 0, n_slot_ = 0; // slots spanned; ByRow

    ContextPtr    context_;
    ggml_cgraph * graph_;
    Pieces        pieces_;
    // The pairs, in the notations that the operations want. Where the kernels find them, which the processor may not.
    int64_t * flat_; // token * n_used + rank
    int32_t * flat32_, *token_, *expert_, *slot_;

    std::function<ggml_tensor *(ggml_tensor *)> copy_of_;

    std::vector<std::pair<const ggml_tensor *, ggml_tensor *>> compact_; // the graph's tensor -> the pass's
};

} // namespace pye
