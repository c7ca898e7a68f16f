#include "pass_graph.h"

#include "error.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace pye {

namespace {

int64_t count_rows(const RowGroups & groups, const std::vector<uint32_t> & experts) {
    int64_t n = 0;
    for (uint32_t e : experts) {
        n += groups.count(e);
    }
    return n;
}

// Of a pass: a few for every node, and three for every expert of a multiplication on its own.
size_t count_tensors(const FfnChain & chain, size_t n_expert, Multiply how, int end) {
    const size_t n_node = static_cast<size_t>(end - chain.begin) + FfnChain::kMostInputs;
    return 4 * n_node + (how == Multiply::ByExpert ? 3 * n_node * n_expert : 0) + 16;
}

} // namespace

size_t PassGraph::row_size(const FfnChain & chain, ggml_cgraph * theirs, int end) {
    size_t size = 0;
    for (int i = chain.begin; i < end; ++i) {
        size += ggml_graph_node(theirs, i)->ne[0] * sizeof(float);
    }
    for (int i = 0; i < chain.n_input; ++i) {
        size += chain.inputs[i]->ne[0] * sizeof(float);
    }
    return size;
}

PassGraph::PassGraph(const FfnChain & chain, const SlotMemory & slots,
                     const std::function<uint32_t(uint32_t)> & slot_of, const RowGroups & groups,
                     const std::vector<uint32_t> & experts, Multiply how, std::vector<char> & tensors,
                     PassMemory & memory, ggml_cgraph * theirs, int end)
    : chain_(chain), slots_(slots), memory_(memory), slot_of_(slot_of), groups_(groups), experts_(experts), how_(how),
      theirs_(theirs), end_(end), one_(chain.n_tokens() == 1), n_row_(count_rows(groups, experts)),
      n1_(one_ ? n_row_ : 1), n2_(one_ ? 1 : n_row_),
      context_(context_in(tensors, count_tensors(chain, experts.size(), how, end))),
      graph_(ggml_new_graph_custom(context_.get(), count_tensors(chain, experts.size(), how, end), false)),
      pieces_(memory.room(row_size(chain, theirs, end) * n_row_ + 5 * Pieces::rounded(n_row_ * sizeof(int64_t)) +
                          (end - chain.begin + FfnChain::kMostInputs) * Pieces::rounded(1))) {
    const size_t n      = static_cast<size_t>(n_row_);
    const auto   layout = [n](Pieces & pieces, int64_t ** flat, std::array<int32_t **, 4> others) {
        char * first = pieces.take(n * sizeof(int64_t));
        char * last  = first;
        *flat        = reinterpret_cast<int64_t *>(first);
        for (int32_t ** list : others) {
            last  = pieces.take(n * sizeof(int32_t));
            *list = reinterpret_cast<int32_t *>(last);
        }
        return static_cast<size_t>(last - first) + n * sizeof(int32_t);
    };
    int64_t *    flat;
    int32_t *    flat32, *token, *expert, *slot;
    const size_t size = layout(pieces_, &flat_, {&flat32_, &token_, &expert_, &slot_});
    Pieces       here(memory.lists(size));
    layout(here, &flat, {&flat32, &token, &expert, &slot});
    if (how == Multiply::ByRow) {
        lowest_ = slot_of(experts.front());
        n_slot_ = slot_of(experts.back()) - lowest_ + 1;
    }
    size_t row = 0;
    for (uint32_t e : experts) {
        const auto in_slot = static_cast<int32_t>(slot_of(e) - lowest_);
        for (uint32_t i = 0; i < groups.count(e); ++i, ++row) {
            const int32_t pair = groups.pairs(e)[i];
            flat[row]          = pair;
            flat32[row]        = pair;
            token[row]         = static_cast<int32_t>(pair / chain.n_used());
            expert[row]        = static_cast<int32_t>(e);
            slot[row]          = in_slot;
        }
    }
    memory.lists_written(size);
}

ggml_tensor * PassGraph::here(const ggml_tensor * t) const {
    for (const auto & [theirs, ours] : compact_) {
        if (theirs == t) {
            return ours;
        }
    }
    throw Error(PYE_E_UNSUPPORTED, "an expert FFN of unknown form");
}

ggml_tensor * PassGraph::with_data(ggml_tensor * t, const void * data) const {
    t->data   = const_cast<void *>(data);
    t->buffer = memory_.buffer();
    return t;
}

ggml_tensor * PassGraph::beside(ggml_tensor * t, const ggml_tensor * other) {
    t->buffer = other->buffer;
    return t;
}

ggml_tensor * PassGraph::ids(const int32_t * values) {
    return with_data(ggml_new_tensor_2d(context_.get(), GGML_TYPE_I32, n1_, n2_), values);
}

void PassGraph::add(ggml_tensor * t) {
    t->flags |= GGML_TENSOR_FLAG_COMPUTE; // else the kernels skip it in silence
    ggml_graph_add_node(graph_, t);
}

void PassGraph::gather(const InputRows & input) {
    ggml_context *      ctx  = context_.get();
    const ggml_tensor * x    = input.x;
    ggml_tensor *       rows = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, x->ne[0], x->ne[1] * x->ne[2]);
    rows->nb[1]              = input.stride;
    rows->nb[2] = rows->nb[3] = input.stride * rows->ne[1];
    rows->data                = input.data;
    rows->buffer              = input.buffer;
    if (one_ && x->ne[1] == 1) { // the kernels broadcast it over the ranks
        compact_.emplace_back(x, beside(ggml_reshape_3d(ctx, rows, x->ne[0], 1, 1), rows));
        return;
    }
    const int32_t * which = x->ne[1] == 1 ? token_ : flat32_;
    ggml_tensor *   some  = ggml_get_rows(ctx, rows, with_data(ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_row_), which));
    with_data(some, pieces_.take(ggml_nbytes(some)));
    add(some);
    compact_.emplace_back(x, beside(ggml_reshape_3d(ctx, some, x->ne[0], n1_, n2_), some));
}

// Rows times the matrix `place` of their experts, or that and the next one as one matrix. `like`: the graph's node.
ggml_tensor * PassGraph::multiply(const ggml_tensor * like, uint32_t place, bool pair, void * result) {
    ggml_context * ctx  = context_.get();
    ggml_tensor *  x    = here(like->src[1]);
    const auto     view = [&](uint32_t first, uint32_t n) {
        return pair ? slots_.view_pair(ctx, place, first, n) : slots_.view(ctx, place, first, n);
    };
    const auto finish = [&](ggml_tensor * t, void * data) {
        memcpy(t->op_params, like->op_params, sizeof t->op_params);
        with_data(t, data);
        add(t);
        return t;
    };
    const int64_t width = like->ne[0] * (pair ? 2 : 1);
    ggml_tensor * out   = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, width, n1_, n2_);
    with_data(out, result != nullptr ? result : pieces_.take(ggml_nbytes(out)));
    if (how_ == Multiply::ByRow) {
        return finish(ggml_mul_mat_id(ctx, view(lowest_, n_slot_), x, ids(slot_)), out->data);
    }
    auto *       to   = static_cast<char *>(out->data);
    const char * from = static_cast<const char *>(x->data);
    for (uint32_t e : experts_) {
        const int64_t n    = groups_.count(e);
        ggml_tensor * rows = with_data(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, x->ne[0], n), from);
        rows->nb[1]        = x->nb[2];
        rows->nb[2] = rows->nb[3] = x->nb[2] * n;
        finish(ggml_mul_mat(ctx, view(slot_of_(e), 1), rows), to);
        from += x->nb[2] * n;
        to += out->nb[2] * n;
    }
    return out;
}

ggml_tensor * PassGraph::same_operation(const ggml_tensor * t) {
    ggml_context * ctx = context_.get();
    ggml_tensor *  r   = nullptr;
    if (t->op == GGML_OP_ADD_ID) {
        ggml_tensor * biases = copy_of_ ? copy_of_(t->src[1]) : t->src[1];
        r                    = ggml_add_id(ctx, here(t->src[0]), biases, ids(expert_)); // they keep the model's ids
    } else {
        r     = ggml_new_tensor_3d(ctx, t->type, t->ne[0], n1_, n2_);
        r->op = t->op;
        for (int s = 0; s < GGML_MAX_SRC && t->src[s] != nullptr; ++s) {
            r->src[s] = here(t->src[s]);
        }
    }
    memcpy(r->op_params, t->op_params, sizeof t->op_params);
    return r;
}

void PassGraph::compute(void * result) {
    ggml_context * ctx   = context_.get();
    int            first = chain_.begin;
    if (chain_.gate != nullptr && slots_.pairs_with_next(binding_of(chain_.gate->src[0])->place)) {
        const ggml_tensor * both = multiply(chain_.gate, binding_of(chain_.gate->src[0])->place, true, nullptr);
        for (ggml_tensor * half : {chain_.gate, chain_.up}) {
            const size_t offset = half == chain_.gate ? 0 : half->ne[0] * sizeof(float);
            compact_.emplace_back(half, beside(ggml_view_3d(ctx, const_cast<ggml_tensor *>(both), half->ne[0], n1_, n2_,
                                                            both->nb[1], both->nb[2], offset),
                                               both));
        }
        first += 2;
    }
    for (int i = first; i < end_; ++i) {
        const ggml_tensor * t  = ggml_graph_node(theirs_, i);
        void *              to = i == end_ - 1 ? result : nullptr;
        if (t->op == GGML_OP_VIEW) {
            ggml_tensor * of     = here(t->src[0]);
            const auto    offset = static_cast<const char *>(t->data) - static_cast<const char *>(t->src[0]->data);
            compact_.emplace_back(
                t, beside(ggml_view_3d(ctx, of, t->ne[0], n1_, n2_, of->nb[1], of->nb[2], static_cast<size_t>(offset)),
                          of));
        } else if (is_expert_matmul(t)) {
            compact_.emplace_back(t, multiply(t, binding_of(t->src[0])->place, false, to));
        } else {
            ggml_tensor * r = same_operation(t);
            with_data(r, to != nullptr ? to : pieces_.take(ggml_nbytes(r)));
            add(r);
            compact_.emplace_back(t, r);
        }
    }
}

void PassGraph::scatter() {
    ggml_context *      ctx  = context_.get();
    const ggml_tensor * last = ggml_graph_node(theirs_, end_ - 1);
    ggml_tensor *       out =
        with_data(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, last->ne[0], chain_.n_used() * chain_.n_tokens()), last->data);
    out->buffer        = last->buffer;
    ggml_tensor * to   = with_data(ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_row_), flat_);
    ggml_tensor * rows = here(last);
    rows               = beside(ggml_reshape_2d(ctx, rows, last->ne[0], n_row_), rows);
    add(beside(ggml_set_rows(ctx, out, rows, to), out));
}

} // namespace pye
