#include "expert_ffn.h"

#include "elapsed.h"
#include "error.h"
#include "ffn_graph.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>

namespace pye {

namespace {

// Bounds on the scratch memory of one pass. MUL_MAT_ID's own scratch grows with (slots spanned) x (pairs) x 8 bytes.
constexpr size_t kMostActivations = 16u << 20;
constexpr size_t kMostKernelWork  = 32u << 20;
constexpr size_t kMostTensors     = 192; // of one pass's graph; a chain has about ten nodes
constexpr size_t kAlign           = 64;

// Beyond a few tokens the kernels' threads sum faster than one thread does.
constexpr int64_t kMostTokensSummed = 4;

// Hands out aligned pieces of a buffer that was made large enough before.
class Pieces {
  public:
    Pieces(std::vector<char> & buffer, size_t need) {
        if (buffer.size() < need + kAlign) {
            buffer.resize(need + kAlign);
        }
        at_ = reinterpret_cast<char *>((reinterpret_cast<uintptr_t>(buffer.data()) + kAlign - 1) / kAlign * kAlign);
    }
    static size_t rounded(size_t n) { return (n + kAlign - 1) / kAlign * kAlign; }
    char *        take(size_t n) {
        char * p = at_;
        at_ += rounded(n);
        return p;
    }

  private:
    char * at_;
};

struct ContextFree {
    void operator()(ggml_context * c) const { ggml_free(c); }
};
using ContextPtr = std::unique_ptr<ggml_context, ContextFree>;

// Nodes as they were, put back on every way out: llama.cpp reuses the graph for the next token.
class Patches {
  public:
    using Saved = std::vector<std::pair<ggml_tensor *, ggml_tensor>>;

    Patches(ggml_cgraph * graph, int begin, int end, Saved & saved) : saved_(saved) {
        saved_.clear();
        for (int i = begin; i < end; ++i) {
            saved_.emplace_back(ggml_graph_node(graph, i), *ggml_graph_node(graph, i));
        }
    }
    ~Patches() {
        for (const auto & [node, before] : saved_) {
            *node = before;
        }
    }
    Patches(const Patches &)             = delete;
    Patches & operator=(const Patches &) = delete;

  private:
    Saved & saved_;
};

// gate and up as the two halves of every row of `both`.
void become_halves_of(const ggml_tensor * both, ggml_tensor * gate, ggml_tensor * up) {
    for (ggml_tensor * half : {gate, up}) {
        half->data = static_cast<char *>(both->data) + (half == gate ? 0 : gate->ne[0] * sizeof(float));
        std::copy(std::begin(both->nb), std::end(both->nb), std::begin(half->nb));
    }
}

} // namespace

ExpertFfn::ExpertFfn() : cpu_(ggml_backend_cpu_init()) {}
ExpertFfn::~ExpertFfn() { ggml_backend_free(cpu_); }

void ExpertFfn::set_n_threads(int n) { ggml_backend_cpu_set_n_threads(cpu_, n); }

void ExpertFfn::set_abort_callback(ggml_abort_callback callback, void * data) {
    abort_      = callback;
    abort_data_ = data;
    ggml_backend_cpu_set_abort_callback(cpu_, callback, data);
}

ggml_status ExpertFfn::compute(ggml_cgraph * graph) {
    Engine * engine = nullptr;
    try {
        find_chains(graph, &chains_);
        if (chains_.empty()) {
            return ggml_backend_graph_compute(cpu_, graph);
        }
        engine          = chains_[0].binding->engine;
        const auto lock = engine->locked();
        engine->check_usable();
        engine_ = engine;
        run_nodes(graph, 0, chains_[0].begin);
        for (size_t i = 0; i < chains_.size(); ++i) {
            run_chain(graph, chains_[i], i + 1 < chains_.size() ? chains_[i + 1].begin : ggml_graph_n_nodes(graph));
        }
        return GGML_STATUS_SUCCESS;
    } catch (const Aborted &) {
        return GGML_STATUS_ABORTED;
    } catch (const Error & e) {
        if (engine != nullptr) {
            engine->fail(e.code(), e.what());
        }
        return GGML_STATUS_FAILED;
    } catch (const std::bad_alloc &) {
        if (engine != nullptr) {
            engine->fail(PYE_E_MEMORY, "out of memory while computing experts");
        }
        return GGML_STATUS_ALLOC_FAILED;
    }
}

void ExpertFfn::read_ids(const ggml_tensor * ids) {
    ids_.resize(static_cast<size_t>(ids->ne[0] * ids->ne[1]));
    for (int64_t t = 0; t < ids->ne[1]; ++t) {
        for (int64_t r = 0; r < ids->ne[0]; ++r) {
            ids_[t * ids->ne[0] + r] = *reinterpret_cast<const int32_t *>(static_cast<const char *>(ids->data) +
                                                                          t * ids->nb[1] + r * ids->nb[0]);
        }
    }
}

// The chain's experts become resident and compute; then the plain nodes behind it, up to `end`.
void ExpertFfn::run_chain(ggml_cgraph * graph, const FfnChain & chain, int end) {
    const auto     start    = std::chrono::steady_clock::now();
    const uint32_t n_expert = chain.layer().n_expert;
    layer_                  = chain.binding->layer;
    read_ids(chain.ids);
    engine_->replay_.apply(chain.binding->layer, &ids_);
    pairs_.assign(n_expert, 0);
    for (int32_t id : ids_) {
        if (id < 0 || static_cast<uint32_t>(id) >= n_expert) {
            throw Error(PYE_E_FORMAT,
                        "the router selected expert " + std::to_string(id) + " of " + std::to_string(n_expert));
        }
        ++pairs_[id];
    }
    wanted_.clear();
    for (uint32_t e = 0; e < n_expert; ++e) {
        if (pairs_[e] != 0) {
            wanted_.push_back({e, pairs_[e]});
        }
    }
    WeightedSum sum;
    const bool  summing = chain.n_tokens() <= kMostTokensSummed && find_weighted_sum(graph, chain.end, end, &sum);
    if (summing) {
        end = sum.begin;
    }
    LayerStep step(*engine_, chain.binding->layer, wanted_);
    look_ahead(chain, summing ? sum.weights : nullptr);
    if (!step.all_resident() || !run_resident(graph, chain, end, step)) {
        run_passes(graph, chain, end, step);
    }
    if (summing) {
        pye::compute(sum);
    }
    ++engine_->stats_.steps_layers;
    engine_->timeline_.until_now(PYE_SPAN_FFN, layer_, start);
}

// From what this layer's router saw: what later layers may need, and a row of the trace.
void ExpertFfn::look_ahead(const FfnChain & chain, const ggml_tensor * weights) {
    const uint32_t      layer = chain.binding->layer;
    const ggml_tensor * x     = chain.inputs[0];
    gate_inputs_.clear();
    for (int64_t t = 0; t < chain.n_tokens(); ++t) {
        gate_inputs_.push_back(
            reinterpret_cast<const float *>(static_cast<const char *>(x->data) + static_cast<size_t>(t) * x->nb[2]));
    }
    const bool alone = chain.n_tokens() == 1;
    if (!alone) {
        engine_->recording_.several();
    } else if (engine_->recording_.on()) {
        engine_->recording_.add(layer, ids_.data(),
                                weights != nullptr ? static_cast<const float *>(weights->data) : nullptr,
                                gate_inputs_[0]);
    }
    if (!engine_->replay_.active()) {
        engine_->prefetcher_->predict(layer, gate_inputs_);
    } else if (alone) {
        engine_->prefetcher_->predict_replayed(layer, engine_->replay_);
    }
}

// Nothing is missing: the graph's own nodes run as they are, with slots in the place of the model's tensors.
// False if the slots lie so far apart that the kernels would want too much memory for it.
bool ExpertFfn::run_resident(ggml_cgraph * graph, const FfnChain & chain, int end, const LayerStep & step) {
    uint32_t lowest = UINT32_MAX, highest = 0;
    slots_.resize(ids_.size());
    for (size_t i = 0; i < ids_.size(); ++i) {
        const uint32_t slot = step.slot_of(static_cast<uint32_t>(ids_[i]));
        slots_[i]           = static_cast<int32_t>(slot);
        lowest              = std::min(lowest, slot);
        highest             = std::max(highest, slot);
    }
    const uint32_t n_slot = highest - lowest + 1;
    const size_t   work   = ids_.size() * sizeof(int64_t);
    if (n_slot > chain.layer().n_expert && n_slot * work > kMostKernelWork) {
        return false;
    }
    for (int32_t & slot : slots_) {
        slot -= static_cast<int32_t>(lowest);
    }
    const SlotArena & arena = *engine_->classes_[chain.layer().shape_class].arena;
    const ContextPtr  owner(fresh_context());
    ggml_context *    ctx = owner.get();
    ggml_cgraph *     g   = ggml_new_graph_custom(ctx, kMostTensors, false);
    ggml_tensor *     ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, chain.n_used(), chain.n_tokens());
    ids->data             = slots_.data();
    ggml_tensor * experts = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, chain.n_used(), chain.n_tokens());
    experts->data         = ids_.data();

    const Patches patches(graph, chain.begin, chain.end, saved_);
    int           first = chain.begin;
    if (chain.gate != nullptr && arena.pairs_with_next(binding_of(chain.gate->src[0])->place)) {
        ggml_tensor * w    = arena.view_pair(ctx, binding_of(chain.gate->src[0])->place, lowest, n_slot);
        ggml_tensor * both = ggml_mul_mat_id(ctx, w, chain.gate->src[1], ids);
        both->data         = Pieces(scratch_, ggml_nbytes(both)).take(ggml_nbytes(both));
        memcpy(both->op_params, chain.gate->op_params, sizeof both->op_params);
        both->flags |= GGML_TENSOR_FLAG_COMPUTE; // else the kernels skip it in silence
        ggml_graph_add_node(g, both);
        become_halves_of(both, chain.gate, chain.up);
        first += 2;
    }
    for (int i = first; i < chain.end; ++i) {
        ggml_tensor * node = ggml_graph_node(graph, i);
        if (is_expert_matmul(node)) {
            node->src[0] = arena.view(ctx, binding_of(node->src[0])->place, lowest, n_slot);
            node->src[2] = ids;
        } else if (node->op == GGML_OP_ADD_ID) {
            node->src[2] = experts; // biases keep the model's expert ids, those that compute
        }
    }
    for (int i = first; i < end; ++i) {
        ggml_graph_add_node(g, ggml_graph_node(graph, i));
    }
    run(g);
    ++engine_->stats_.passes;
    return true;
}

// Something is missing: what is here computes while the rest arrives. Every pass writes its own rows of the chain's last
// node; all pairs of one expert are in one pass, so that the kernels see the same groups of rows at every budget.
void ExpertFfn::run_passes(ggml_cgraph * graph, const FfnChain & chain, int end, LayerStep & step) {
    // The allocator may have given the inputs' memory to the outputs that the first pass writes.
    size_t need = 0;
    for (int i = 0; i < chain.n_input; ++i) {
        const ggml_tensor * x = chain.inputs[i];
        need += Pieces::rounded(ggml_nelements(x) * sizeof(float));
    }
    Pieces                    pieces(inputs_, need);
    std::vector<const char *> inputs;
    for (int i = 0; i < chain.n_input; ++i) {
        const ggml_tensor * x    = chain.inputs[i];
        const size_t        row  = x->ne[0] * sizeof(float);
        char *              copy = pieces.take(ggml_nelements(x) * sizeof(float));
        inputs.push_back(copy);
        for (int64_t t = 0; t < x->ne[2]; ++t) {
            for (int64_t r = 0; r < x->ne[1]; ++r, copy += row) {
                memcpy(copy, static_cast<const char *>(x->data) + t * x->nb[2] + r * x->nb[1], row);
            }
        }
    }
    size_t per_pair = 0; // bytes of activations
    for (int i = chain.begin; i < chain.end; ++i) {
        per_pair += ggml_graph_node(graph, i)->ne[0] * sizeof(float);
    }
    for (int i = 0; i < chain.n_input; ++i) {
        per_pair += chain.inputs[i]->ne[0] * sizeof(float);
    }
    for (std::vector<uint32_t> experts = step.next(); !experts.empty(); experts = step.next()) {
        for (size_t i = 0; i < experts.size();) {
            std::vector<uint32_t> some;
            size_t                n_pair = 0;
            for (; i < experts.size(); ++i) {
                const size_t more = n_pair + pairs_[experts[i]];
                const size_t span = step.slot_of(experts[i]) - step.slot_of(some.empty() ? experts[i] : some[0]) + 1;
                if (!some.empty() &&
                    (more * per_pair > kMostActivations || span * more * sizeof(int64_t) > kMostKernelWork)) {
                    break;
                }
                some.push_back(experts[i]);
                n_pair = more;
            }
            run_pass(graph, chain, step, some, inputs);
            step.computed(some);
        }
    }
    run_nodes(graph, chain.end, end);
}

// The chain for the pairs of some resident experts: gather their input rows, the chain's nodes on compact rows, scatter.
void ExpertFfn::run_pass(ggml_cgraph * graph, const FfnChain & chain, const LayerStep & step,
                         const std::vector<uint32_t> & experts, const std::vector<const char *> & inputs) {
    const int64_t  n_used   = chain.n_used();
    const bool     one      = chain.n_tokens() == 1;
    const uint32_t lowest   = step.slot_of(experts.front());
    const uint32_t n_slot   = step.slot_of(experts.back()) - lowest + 1;
    int64_t        n_pair   = 0;
    size_t         activity = 0;
    for (uint32_t e : experts) {
        n_pair += pairs_[e];
    }
    for (int i = chain.begin; i < chain.end; ++i) {
        activity += Pieces::rounded(ggml_graph_node(graph, i)->ne[0] * sizeof(float) * n_pair);
    }
    for (int i = 0; i < chain.n_input; ++i) {
        activity += Pieces::rounded(chain.inputs[i]->ne[0] * sizeof(float) * n_pair);
    }
    Pieces pieces(scratch_, activity + 5 * Pieces::rounded(n_pair * sizeof(int64_t)));

    // Which pairs, and in the four notations that the operations want.
    auto * flat   = reinterpret_cast<int64_t *>(pieces.take(n_pair * sizeof(int64_t))); // token * n_used + rank
    auto * flat32 = reinterpret_cast<int32_t *>(pieces.take(n_pair * sizeof(int32_t)));
    auto * token  = reinterpret_cast<int32_t *>(pieces.take(n_pair * sizeof(int32_t)));
    auto * expert = reinterpret_cast<int32_t *>(pieces.take(n_pair * sizeof(int32_t)));
    auto * slot   = reinterpret_cast<int32_t *>(pieces.take(n_pair * sizeof(int32_t)));
    slots_.assign(pairs_.size(), -1); // by expert, for this pass
    for (uint32_t e : experts) {
        slots_[e] = static_cast<int32_t>(step.slot_of(e) - lowest);
    }
    int64_t p = 0;
    for (size_t i = 0; i < ids_.size(); ++i) {
        if (slots_[ids_[i]] >= 0) {
            flat[p]   = static_cast<int64_t>(i);
            flat32[p] = static_cast<int32_t>(i);
            token[p]  = static_cast<int32_t>(i / n_used);
            expert[p] = ids_[i];
            slot[p]   = slots_[ids_[i]];
            ++p;
        }
    }

    // Decoding keeps ranks as ranks; with many tokens every pair becomes a token of one rank.
    const int64_t    n1 = one ? n_pair : 1;
    const int64_t    n2 = one ? 1 : n_pair;
    const ContextPtr owner(fresh_context());
    ggml_context *   ctx = owner.get();
    ggml_cgraph *    g   = ggml_new_graph_custom(ctx, kMostTensors, false);

    const auto with_data = [](ggml_tensor * t, void * data) {
        t->data = data;
        return t;
    };
    const auto add = [g](ggml_tensor * t) {
        t->flags |= GGML_TENSOR_FLAG_COMPUTE; // else the kernels skip it in silence
        ggml_graph_add_node(g, t);
    };
    ggml_tensor * slot_ids   = with_data(ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n1, n2), slot);
    ggml_tensor * expert_ids = with_data(ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n1, n2), expert);

    std::vector<std::pair<const ggml_tensor *, ggml_tensor *>> compact; // the graph's tensor -> the pass's
    const auto                                                 here = [&compact](const ggml_tensor * t) {
        for (const auto & [theirs, ours] : compact) {
            if (theirs == t) {
                return ours;
            }
        }
        throw Error(PYE_E_UNSUPPORTED, "an expert FFN of unknown form");
    };
    for (size_t i = 0; i < inputs.size(); ++i) {
        const ggml_tensor * x    = chain.inputs[i];
        ggml_tensor *       rows = with_data(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, x->ne[0], x->ne[1] * x->ne[2]),
                                             const_cast<char *>(inputs[i]));
        if (one && x->ne[1] == 1) {
            compact.emplace_back(x,
                                 ggml_reshape_3d(ctx, rows, x->ne[0], 1, 1)); // the kernels broadcast it over the ranks
            continue;
        }
        ggml_tensor * which = with_data(ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_pair), x->ne[1] == 1 ? token : flat32);
        ggml_tensor * some  = ggml_get_rows(ctx, rows, which);
        some->data          = pieces.take(ggml_nbytes(some));
        add(some);
        compact.emplace_back(x, ggml_reshape_3d(ctx, some, x->ne[0], n1, n2));
    }

    const SlotArena & arena = *engine_->classes_[chain.layer().shape_class].arena;
    int               first = chain.begin;
    if (chain.gate != nullptr && arena.pairs_with_next(binding_of(chain.gate->src[0])->place)) {
        ggml_tensor * w    = arena.view_pair(ctx, binding_of(chain.gate->src[0])->place, lowest, n_slot);
        ggml_tensor * both = ggml_mul_mat_id(ctx, w, here(chain.gate->src[1]), slot_ids);
        memcpy(both->op_params, chain.gate->op_params, sizeof both->op_params);
        both->data = pieces.take(ggml_nbytes(both));
        add(both);
        for (ggml_tensor * half : {chain.gate, chain.up}) {
            const size_t offset = half == chain.gate ? 0 : half->ne[0] * sizeof(float);
            compact.emplace_back(half, ggml_view_3d(ctx, both, half->ne[0], n1, n2, both->nb[1], both->nb[2], offset));
        }
        first += 2;
    }
    for (int i = first; i < chain.end; ++i) {
        const ggml_tensor * t = ggml_graph_node(graph, i);
        ggml_tensor *       r = nullptr;
        if (t->op == GGML_OP_VIEW) {
            ggml_tensor * of     = here(t->src[0]);
            const auto    offset = static_cast<const char *>(t->data) - static_cast<const char *>(t->src[0]->data);
            compact.emplace_back(
                t, ggml_view_3d(ctx, of, t->ne[0], n1, n2, of->nb[1], of->nb[2], static_cast<size_t>(offset)));
            continue;
        }
        if (is_expert_matmul(t)) {
            r = ggml_mul_mat_id(ctx, arena.view(ctx, binding_of(t->src[0])->place, lowest, n_slot), here(t->src[1]),
                                slot_ids);
        } else if (t->op == GGML_OP_ADD_ID) {
            r = ggml_add_id(ctx, here(t->src[0]), t->src[1], expert_ids); // biases keep the model's expert ids
        } else {
            r     = ggml_new_tensor_3d(ctx, t->type, t->ne[0], n1, n2);
            r->op = t->op;
            for (int s = 0; s < GGML_MAX_SRC && t->src[s] != nullptr; ++s) {
                r->src[s] = here(t->src[s]);
            }
        }
        memcpy(r->op_params, t->op_params, sizeof t->op_params);
        r->data = pieces.take(ggml_nbytes(r));
        add(r);
        compact.emplace_back(t, r);
    }

    const ggml_tensor * last = ggml_graph_node(graph, chain.end - 1);
    ggml_tensor *       out =
        with_data(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, last->ne[0], n_used * chain.n_tokens()), last->data);
    ggml_tensor * to = with_data(ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_pair), flat);
    add(ggml_set_rows(ctx, out, ggml_reshape_2d(ctx, here(last), last->ne[0], n_pair), to));
    run(g);
    ++engine_->stats_.passes;
}

void ExpertFfn::run_nodes(ggml_cgraph * graph, int begin, int end) {
    if (begin >= end) {
        return;
    }
    const size_t     n = static_cast<size_t>(end - begin);
    const ContextPtr ctx(ggml_init({ggml_graph_overhead_custom(n, false) + 64, nullptr, /*no_alloc=*/true}));
    ggml_cgraph *    g = ggml_new_graph_custom(ctx.get(), n, false);
    for (int i = begin; i < end; ++i) {
        ggml_graph_add_node(g, ggml_graph_node(graph, i));
    }
    run(g);
}

void ExpertFfn::run(ggml_cgraph * graph) {
    if (abort_ != nullptr && abort_(abort_data_)) {
        throw Aborted{};
    }
    const auto        start  = std::chrono::steady_clock::now();
    const ggml_status status = ggml_backend_graph_compute(cpu_, graph);
    engine_->stats_.compute_ns += nanoseconds_since(start);
    engine_->timeline_.until_now(PYE_SPAN_COMPUTE, layer_, start);
    if (status == GGML_STATUS_ABORTED) {
        throw Aborted{};
    }
    if (status != GGML_STATUS_SUCCESS) {
        throw Error(PYE_E_MEMORY, "the CPU kernels could not compute the experts (out of memory?)");
    }
}

ggml_context * ExpertFfn::fresh_context() {
    const size_t size = kMostTensors * ggml_tensor_overhead() + ggml_graph_overhead_custom(kMostTensors, false);
    if (arena_.size() < size) {
        arena_.resize(size);
    }
    return ggml_init({arena_.size(), arena_.data(), /*no_alloc=*/true});
}

} // namespace pye
