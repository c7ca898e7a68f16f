#include "ffn_graph.h"

#include "error.h"

#include <algorithm>
#include <cstring>

namespace pye {

namespace {

bool keeps_rows(const ggml_tensor * view) {
    const ggml_tensor * of = view->src[0];
    return view->ne[1] == of->ne[1] && view->ne[2] == of->ne[2] && view->ne[3] == of->ne[3];
}

bool is_elementwise(ggml_op op) {
    return op == GGML_OP_GLU || op == GGML_OP_UNARY || op == GGML_OP_CLAMP || op == GGML_OP_SQR || op == GGML_OP_SQRT ||
           op == GGML_OP_SCALE;
}

bool is_arithmetic(ggml_op op) {
    return op == GGML_OP_MUL || op == GGML_OP_ADD || op == GGML_OP_SUB || op == GGML_OP_DIV;
}

// One row of activations per (token, rank) pair, derived from our matrices.
bool is_rows(const ggml_tensor * t) {
    if (t == nullptr) {
        return false;
    }
    if (is_elementwise(t->op)) {
        return is_rows(t->src[0]) && (t->src[1] == nullptr || is_rows(t->src[1]));
    }
    switch (t->op) {
        case GGML_OP_MUL_MAT_ID: return is_expert_matmul(t);
        case GGML_OP_ADD_ID: return is_rows(t->src[0]);
        case GGML_OP_MUL: return is_rows(t->src[0]); // by activations, or by the routing weights
        case GGML_OP_ADD: return is_rows(t->src[0]) && is_rows(t->src[1]);
        case GGML_OP_VIEW: return keeps_rows(t) && is_rows(t->src[0]);
        default: return false;
    }
}

// One rank of the rows of all tokens, and the sum over ranks.
bool is_rank(const ggml_tensor * t) { return t != nullptr && t->op == GGML_OP_VIEW && is_rows(t->src[0]); }
bool is_sum(const ggml_tensor * t) {
    if (t == nullptr) {
        return false;
    }
    return (t->op == GGML_OP_CONT && is_rank(t->src[0])) ||
           (t->op == GGML_OP_ADD && is_rank(t->src[1]) && (is_rank(t->src[0]) || is_sum(t->src[0])));
}

// Grows a chain node by node; says no at the first node that a pass could not compute.
class ChainWalk {
  public:
    ChainWalk(ggml_cgraph * graph, FfnChain & chain) : graph_(graph), chain_(chain), end_(chain.begin) {}

    bool accept(ggml_tensor * t) {
        bool yes = false;
        if (is_expert_matmul(t)) {
            const Binding * b = binding_of(t->src[0]);
            yes = b->engine == chain_.binding->engine && b->layer == chain_.binding->layer && t->src[2] == chain_.ids &&
                  (member(t->src[1]) || input(t->src[1]));
        } else if (t->op == GGML_OP_ADD_ID) {
            yes = member(t->src[0]) && t->src[2] == chain_.ids;
        } else if (t->op == GGML_OP_VIEW) {
            yes = member(t->src[0]) && keeps_rows(t) && t->nb[1] == t->src[0]->nb[1] && t->nb[2] == t->src[0]->nb[2];
        } else if (is_elementwise(t->op)) {
            yes = member(t->src[0]) && (t->src[1] == nullptr || member(t->src[1]));
        } else if (is_arithmetic(t->op)) {
            yes = member(t->src[0]) && member(t->src[1]) && ggml_are_same_shape(t->src[0], t->src[1]);
        }
        end_ += yes;
        return yes;
    }

  private:
    bool member(const ggml_tensor * t) const {
        for (int i = chain_.begin; i < end_; ++i) {
            if (ggml_graph_node(graph_, i) == t) {
                return true;
            }
        }
        return false;
    }

    bool input(const ggml_tensor * x) {
        if (x->type != GGML_TYPE_F32 || x->nb[0] != sizeof(float) || x->ne[2] != chain_.ids->ne[1] || x->ne[3] != 1 ||
            (x->ne[1] != 1 && x->ne[1] != chain_.ids->ne[0])) {
            return false;
        }
        const auto last = chain_.inputs + chain_.n_input;
        if (std::find(chain_.inputs, last, x) == last) {
            if (chain_.n_input == FfnChain::kMostInputs) {
                return false;
            }
            chain_.inputs[chain_.n_input++] = x;
        }
        return true;
    }

    ggml_cgraph * graph_;
    FfnChain &    chain_;
    int           end_; // of the accepted nodes
};

// Whether one of the nodes [begin, end) reads `t`.
bool used_in(ggml_cgraph * graph, const ggml_tensor * t, int begin, int end) {
    for (int i = begin; i < end; ++i) {
        const auto & src = ggml_graph_node(graph, i)->src;
        if (std::find(std::begin(src), std::end(src), t) != std::end(src)) {
            return true;
        }
    }
    return false;
}

// Gate and up read the same input and meet in a GLU that is their only reader: such a pair can be one multiplication.
void find_gate_and_up(ggml_cgraph * graph, FfnChain & chain) {
    if (chain.end - chain.begin < 3) {
        return;
    }
    ggml_tensor * a   = ggml_graph_node(graph, chain.begin);
    ggml_tensor * b   = ggml_graph_node(graph, chain.begin + 1);
    ggml_tensor * glu = ggml_graph_node(graph, chain.begin + 2);
    if (!is_expert_matmul(b) || a->src[1] != b->src[1] || glu->op != GGML_OP_GLU || glu->src[1] == nullptr ||
        used_in(graph, a, chain.begin + 3, chain.end) || used_in(graph, b, chain.begin + 3, chain.end)) {
        return;
    }
    if (binding_of(a->src[0])->place > binding_of(b->src[0])->place) {
        std::swap(a, b);
    }
    if (binding_of(a->src[0])->place + 1 == binding_of(b->src[0])->place &&
        memcmp(a->op_params, b->op_params, sizeof a->op_params) == 0) {
        chain.gate = a;
        chain.up   = b;
    }
}

} // namespace

bool is_expert_matmul(const ggml_tensor * t) { return t->op == GGML_OP_MUL_MAT_ID && binding_of(t->src[0]) != nullptr; }

bool belongs_to_expert_ffn(const ggml_tensor * t) {
    return (t->op == GGML_OP_NONE && binding_of(t) != nullptr) || is_rows(t) || is_rank(t) || is_sum(t);
}

void read_ids(const FfnChain & chain, const void * from, std::vector<int32_t> * ids) {
    const auto n_used = static_cast<size_t>(chain.n_used()), n_tokens = static_cast<size_t>(chain.n_tokens());
    ids->resize(n_used * n_tokens);
    for (size_t t = 0; t < n_tokens; ++t) {
        for (size_t r = 0; r < n_used; ++r) {
            memcpy(&(*ids)[t * n_used + r],
                   static_cast<const char *>(from) + t * chain.ids->nb[1] + r * chain.ids->nb[0], sizeof(int32_t));
        }
    }
}

Engine * engine_of(ggml_cgraph * graph) {
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        if (is_expert_matmul(ggml_graph_node(graph, i))) {
            return binding_of(ggml_graph_node(graph, i)->src[0])->engine;
        }
    }
    return nullptr;
}

void find_chains(ggml_cgraph * graph, std::vector<FfnChain> * chains) {
    chains->clear();
    const int n = ggml_graph_n_nodes(graph);
    for (int i = 0; i < n;) {
        ggml_tensor * first = ggml_graph_node(graph, i);
        if (!is_expert_matmul(first)) {
            ++i;
            continue;
        }
        FfnChain chain;
        chain.begin     = i;
        chain.binding   = binding_of(first->src[0]);
        chain.ids       = first->src[2];
        const auto grow = [&](int stop) {
            ChainWalk walk(graph, chain);
            for (int j = i; j < stop && walk.accept(ggml_graph_node(graph, j)); ++j) {
                if (is_expert_matmul(ggml_graph_node(graph, j))) {
                    chain.end = j + 1;
                }
            }
        };
        grow(n);
        if (chain.end == 0) {
            throw Error(PYE_E_UNSUPPORTED, std::string("an expert multiplication of unknown form: ") + first->name);
        }
        // Only the last node's rows are written where the graph expects them. If others are wanted outside, compute
        // multiplication by multiplication. A node that nobody here reads is one of these: an eval callback cuts graphs
        // after any node, and the reader is in the next piece.
        for (int k = chain.begin; k + 1 < chain.end; ++k) {
            const ggml_tensor * node = ggml_graph_node(graph, k);
            if (!used_in(graph, node, k + 1, chain.end) || used_in(graph, node, chain.end, n)) {
                chain.n_input = 0;
                grow(i + 1);
                break;
            }
        }
        find_gate_and_up(graph, chain);
        chains->push_back(chain);
        i = chain.end;
    }
}

} // namespace pye
