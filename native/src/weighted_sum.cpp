// The weighted sum over ranks, in one go. Stock computes it with a node per rank, each followed by a barrier of all threads,
// which for a token or a few cost more than the sums; for many tokens it writes and reads every product and partial sum.
#include "ffn_graph.h"

#include <algorithm>

namespace pye {

namespace {

bool is_rank_of(const ggml_tensor * view, const ggml_tensor * rows, int64_t rank) {
    return view->op == GGML_OP_VIEW && view->src[0] == rows && view->ne[0] == rows->ne[0] &&
           view->ne[1] == rows->ne[2] && view->ne[2] == 1 && view->nb[1] == rows->nb[2] &&
           view->data == static_cast<const char *>(rows->data) + rank * rows->nb[1];
}

} // namespace

bool overlap(const ggml_tensor * a, const ggml_tensor * b) {
    const auto * pa = static_cast<const char *>(a->data);
    const auto * pb = static_cast<const char *>(b->data);
    return pa < pb + ggml_nbytes(b) && pb < pa + ggml_nbytes(a);
}

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

bool sums_rows_of(const WeightedSum & sum, ggml_cgraph * graph, const FfnChain & chain) {
    for (int i = chain.end; i < sum.begin; ++i) {
        const ggml_tensor * t = ggml_graph_node(graph, i);
        if (t->op != GGML_OP_ADD_ID || t->src[0] != ggml_graph_node(graph, i - 1) || t->src[2] != chain.ids) {
            return false;
        }
    }
    if (sum.rows != ggml_graph_node(graph, sum.begin - 1)) {
        return false;
    }
    for (int i = chain.end; i < ggml_graph_n_nodes(graph); ++i) {
        if (i == sum.begin) {
            continue;
        }
        for (const ggml_tensor * source : ggml_graph_node(graph, i)->src) {
            for (int row = chain.end - 1; source != nullptr && row < sum.begin; ++row) {
                if (source == ggml_graph_node(graph, row) && i != row + 1) {
                    return false;
                }
            }
        }
    }
    return true;
}

void RankSum::compute(int64_t first_token, int64_t last_token) const {
    constexpr int64_t kWidth = 32; // sums that stay in registers
    const int64_t     n = sum.rows->ne[0], n_used = sum.rows->ne[1];
    const auto *      rows = static_cast<const float *>(sum.rows->data);
    for (int64_t t = first_token; t < last_token; ++t) {
        auto *        out    = static_cast<float *>(sum.out->data) + t * n;
        const float * weight = weights + t * n_used;
        const auto    row    = [&](int64_t r) {
            return rows + (row_of != nullptr ? row_of[t * n_used + r] : t * n_used + r) * n;
        };
        int64_t i = 0;
        for (; i + kWidth <= n; i += kWidth) {
            float         so_far[kWidth];
            const float * first = row(0) + i;
            for (int64_t k = 0; k < kWidth; ++k) {
                so_far[k] = weight[0] * first[k];
            }
            for (int64_t r = 1; r < n_used; ++r) {
                const float * next = row(r) + i;
                for (int64_t k = 0; k < kWidth; ++k) {
                    const float product = weight[r] * next[k]; // rounded by itself: no fused multiply-add, see
                    so_far[k] += product;                      // CMakeLists.txt
                }
            }
            std::copy(so_far, so_far + kWidth, out + i);
        }
        for (; i < n; ++i) {
            float so_far = weight[0] * row(0)[i];
            for (int64_t r = 1; r < n_used; ++r) {
                const float product = weight[r] * row(r)[i];
                so_far += product;
            }
            out[i] = so_far;
        }
    }
}

} // namespace pye
