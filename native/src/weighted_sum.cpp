// The weighted sum over ranks, in one go. Stock computes it with a node per rank, each followed by a barrier of all threads;
// for a token or a few, the barriers cost more than the sums.
#include "ffn_graph.h"

#include <algorithm>
#include <vector>

namespace pye {

namespace {

bool overlap(const ggml_tensor * a, const ggml_tensor * b) {
    const auto * pa = static_cast<const char *>(a->data);
    const auto * pb = static_cast<const char *>(b->data);
    return pa < pb + ggml_nbytes(b) && pb < pa + ggml_nbytes(a);
}

bool is_rank_of(const ggml_tensor * view, const ggml_tensor * rows, int64_t rank) {
    return view->op == GGML_OP_VIEW && view->src[0] == rows && view->ne[0] == rows->ne[0] &&
           view->ne[1] == rows->ne[2] && view->ne[2] == 1 && view->nb[1] == rows->nb[2] &&
           view->data == static_cast<const char *>(rows->data) + rank * rows->nb[1];
}

} // namespace

bool find_weighted_sum(ggml_cgraph * graph, int begin, int end, WeightedSum * sum) {
    int i = begin;
    while (i < end && (ggml_graph_node(graph, i)->op != GGML_OP_MUL || ggml_graph_node(graph, i)->ne[1] < 2)) {
        ++i;
    }
    if (i == end) {
        return false;
    }
    const ggml_tensor * weighted = ggml_graph_node(graph, i);
    const ggml_tensor * rows     = weighted->src[0];
    const ggml_tensor * weights  = weighted->src[1];
    const int64_t       n_used   = rows->ne[1];
    if (rows->type != GGML_TYPE_F32 || weights->type != GGML_TYPE_F32 || weights->ne[0] != 1 ||
        weights->ne[1] != n_used || weights->ne[2] != rows->ne[2] || rows->ne[3] != 1 || !ggml_is_contiguous(rows) ||
        !ggml_is_contiguous(weights)) {
        return false;
    }
    const ggml_tensor * before = nullptr; // the sum of the ranks so far
    int64_t             rank   = 1;
    ggml_tensor *       out    = nullptr;
    for (int j = i + 1; j < end; ++j) {
        ggml_tensor * t = ggml_graph_node(graph, j);
        if (t->op == GGML_OP_VIEW && t->src[0] == weighted) {
            continue;
        }
        const bool first = t->op == GGML_OP_ADD && rank == 1 && is_rank_of(t->src[0], weighted, 0);
        if (t->op != GGML_OP_ADD || !(first || t->src[0] == before) || !is_rank_of(t->src[1], weighted, rank)) {
            return false;
        }
        before = out = t;
        ++rank;
    }
    // The allocator may have given the rows' memory to the sum, once the products no longer need it.
    if (out == nullptr || rank != n_used || !ggml_is_contiguous(out) || overlap(out, rows)) {
        return false;
    }
    *sum = {i, rows, weights, out};
    return true;
}

void compute(const WeightedSum & sum) {
    const int64_t      n = sum.rows->ne[0], n_used = sum.rows->ne[1], n_tokens = sum.rows->ne[2];
    const auto *       rows = static_cast<const float *>(sum.rows->data);
    auto *             out  = static_cast<float *>(sum.out->data);
    const auto *       w    = static_cast<const float *>(sum.weights->data);
    std::vector<float> weights(w, w + n_used * n_tokens); // they may lie where the sum goes
    for (int64_t t = 0; t < n_tokens; ++t) {
        for (int64_t i = 0; i < n; ++i) {
            out[t * n + i] = weights[t * n_used] * rows[t * n_used * n + i];
        }
        for (int64_t r = 1; r < n_used; ++r) {
            const float   weight = weights[t * n_used + r];
            const float * row    = rows + (t * n_used + r) * n;
            for (int64_t i = 0; i < n; ++i) {
                const float product = weight * row[i]; // rounded by itself: no fused multiply-add, see CMakeLists.txt
                out[t * n + i] += product;
            }
        }
    }
}

} // namespace pye
