#include "rerun.h"

#include <algorithm>

namespace pye {

namespace {

bool is_view(const ggml_tensor * t) {
    return t->op == GGML_OP_NONE || t->op == GGML_OP_VIEW || t->op == GGML_OP_RESHAPE || t->op == GGML_OP_PERMUTE ||
           t->op == GGML_OP_TRANSPOSE;
}

// Of which we know that they write their own result and nothing else.
bool writes_its_result_alone(const ggml_tensor * t) {
    switch (t->op) {
        case GGML_OP_ADD:
        case GGML_OP_ADD_ID:
        case GGML_OP_SUB:
        case GGML_OP_MUL:
        case GGML_OP_DIV:
        case GGML_OP_SQR:
        case GGML_OP_SQRT:
        case GGML_OP_SCALE:
        case GGML_OP_CLAMP:
        case GGML_OP_UNARY:
        case GGML_OP_GLU:
        case GGML_OP_CONCAT:
        case GGML_OP_REPEAT:
        case GGML_OP_CONT:
        case GGML_OP_NORM:
        case GGML_OP_RMS_NORM:
        case GGML_OP_L2_NORM:
        case GGML_OP_GROUP_NORM:
        case GGML_OP_SUM_ROWS:
        case GGML_OP_MUL_MAT:
        case GGML_OP_MUL_MAT_ID:
        case GGML_OP_GET_ROWS:
        case GGML_OP_SOFT_MAX:
        case GGML_OP_ROPE:
        case GGML_OP_ARGSORT:
        case GGML_OP_TOP_K:
        case GGML_OP_FLASH_ATTN_EXT: return t->view_src == nullptr; // in place of something else is another matter
        case GGML_OP_SET_ROWS: return true;                         // the same rows again
        default: return is_view(t);
    }
}

bool overlap(const MemoryRange & a, const MemoryRange & b) {
    return a.begin < b.begin + b.size && b.begin < a.begin + a.size;
}

bool contains(const MemoryRange & outer, const MemoryRange & inner) {
    return outer.begin <= inner.begin && inner.begin + inner.size <= outer.begin + outer.size;
}

} // namespace

MemoryRange range_of(const ggml_tensor * t) { return {static_cast<char *>(t->data), ggml_nbytes(t), t->buffer}; }
bool        same(const MemoryRange & a, const MemoryRange & b) { return a.begin == b.begin && a.size == b.size; }

bool can_be_repeated(ggml_cgraph * graph, int begin, int end) {
    for (int i = begin; i < end; ++i) {
        if (!writes_its_result_alone(ggml_graph_node(graph, i))) {
            return false;
        }
    }
    return true;
}

std::vector<MemoryRange> overwritten_inputs(ggml_cgraph * graph, int begin, int end) {
    std::vector<const ggml_tensor *> inside;
    std::vector<MemoryRange>         written, found;
    for (int i = begin; i < end; ++i) {
        const ggml_tensor * t = ggml_graph_node(graph, i);
        inside.push_back(t);
        if (!is_view(t) && t->op != GGML_OP_SET_ROWS) {
            written.push_back(range_of(t));
        }
    }
    std::sort(inside.begin(), inside.end());
    const auto consider = [&](const ggml_tensor * t) {
        if (t == nullptr || t->data == nullptr || t->buffer == nullptr ||
            std::binary_search(inside.begin(), inside.end(), t) ||
            ggml_backend_buffer_get_usage(t->buffer) == GGML_BACKEND_BUFFER_USAGE_WEIGHTS) {
            return;
        }
        const MemoryRange r = range_of(t);
        if (std::any_of(written.begin(), written.end(), [&r](const MemoryRange & w) { return overlap(r, w); }) &&
            std::none_of(found.begin(), found.end(), [&r](const MemoryRange & f) { return contains(f, r); })) {
            found.push_back(r);
        }
    };
    for (int i = begin; i < end; ++i) {
        const ggml_tensor * t = ggml_graph_node(graph, i);
        for (const ggml_tensor * source : t->src) {
            consider(source);
        }
    }
    return found;
}

} // namespace pye
