#include "expert_ffn.h"

#include "elapsed.h"
#include "error.h"
#include "ffn_graph.h"
#include "pass_graph.h"
#include "scratch.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>

namespace pye {

namespace {

// Bounds on the scratch memory of one pass. MUL_MAT_ID's own scratch grows with (slots spanned) x (pairs) x 8 bytes.
constexpr size_t kMostActivations = 16u << 20;
constexpr size_t kMostKernelWork  = 32u << 20;
constexpr size_t kMostTensors     = 192; // of the graph's own nodes; a chain has about ten
// While others wait for slots, a pass takes no more than this: slots become free in time for loads to go on meanwhile.
constexpr size_t kMostActivationsInNeed = 1u << 20;

// Beyond a few tokens the kernels' threads sum faster than one thread does.
constexpr int64_t kMostTokensSummed = 4;

// Steps of more tokens whose experts have several rows each are computed expert by expert. The rule sees shapes and ids only,
// neither clock nor residency: rounding must be the same in every run and at every budget. On two cores of a Xeon with
// AVX-512, experts of 62 KB computed 17 tokens (4 rows each) at 0.97 of stock's speed and 32 tokens at 1.03; experts of 2 MB 17
// tokens at 1.28.
constexpr int64_t  kMostTokensByRow  = 16;
constexpr uint64_t kRowsForOneExpert = 4;      // on average; the matrix-matrix kernels take rows by four
constexpr uint64_t kWorkForOneExpert = 400000; // its bytes times its rows: less does not pay for its multiplications

Multiply how_to_multiply(const SlotArena & arena, int64_t n_tokens, size_t n_pair, size_t n_expert) {
    const bool together = arena.rounds_alike() && n_tokens > kMostTokensByRow &&
                          n_pair >= kRowsForOneExpert * n_expert &&
                          n_pair * arena.stride() >= kWorkForOneExpert * n_expert;
    return together ? Multiply::ByExpert : Multiply::ByRow;
}

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
    Engine * const engine = engine_of(graph);
    if (engine == nullptr) {
        return ggml_backend_graph_compute(cpu_, graph);
    }
    try {
        find_chains(graph, &chains_);
        const auto lock = engine->locked();
        engine->check_usable();
        if (engine->gpu() != nullptr) {
            throw Error(PYE_E_UNSUPPORTED, "llama.cpp wants experts computed on the CPU whose slots are on a GPU");
        }
        engine_ = engine;
        run_nodes(graph, 0, chains_[0].begin);
        for (size_t i = 0; i < chains_.size(); ++i) {
            run_chain(graph, chains_[i], i + 1 < chains_.size() ? chains_[i + 1].begin : ggml_graph_n_nodes(graph));
        }
        return GGML_STATUS_SUCCESS;
    } catch (const Aborted &) {
        return GGML_STATUS_ABORTED;
    } catch (const Error & e) {
        engine->fail(e.code(), e.what());
        return GGML_STATUS_FAILED;
    } catch (const std::bad_alloc &) {
        engine->fail(PYE_E_MEMORY, "out of memory while computing experts");
        return GGML_STATUS_ALLOC_FAILED;
    } catch (const std::exception & e) { // llama.cpp's C cannot pass it on
        engine->fail(PYE_E_STATE, e.what());
        return GGML_STATUS_FAILED;
    }
}

// The chain's experts become resident and compute; then the plain nodes behind it, up to `end`.
void ExpertFfn::run_chain(ggml_cgraph * graph, const FfnChain & chain, int end) {
    const auto     start    = std::chrono::steady_clock::now();
    const uint32_t n_expert = chain.layer().n_expert;
    layer_                  = chain.binding->layer;
    read_ids(chain, chain.ids->data, &ids_);
    engine_->hear(chain.binding->layer, &ids_);
    groups_.assign(ids_, n_expert);
    list_wanted(groups_, n_expert, &wanted_);
    WeightedSum    sum;
    const bool     summing = find_weighted_sum(graph, chain.end, end, &sum);
    const Multiply how     = how_to_multiply(*engine_->classes_[chain.layer().shape_class].arena, chain.n_tokens(),
                                             ids_.size(), wanted_.size());
    if (summing) {
        end = sum.begin;
    }
    row_of_.clear();
    LayerStep step(*engine_, chain.binding->layer, wanted_);
    look_ahead(chain, summing ? sum.weights : nullptr);
    if (how == Multiply::ByExpert) {
        run_passes(graph, chain, end, step, how, summing && sums_rows_of(sum, graph, chain));
    } else if (!step.all_resident() || !run_resident(graph, chain, end, step)) {
        run_passes(graph, chain, end, step, how, false);
    }
    if (summing) {
        add_up(sum);
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
    engine_->look_ahead(layer, ids_, weights != nullptr ? static_cast<const float *>(weights->data) : nullptr,
                        gate_inputs_, chain.n_tokens());
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
    const ContextPtr  owner = context_in(tensors_, kMostTensors);
    ggml_context *    ctx   = owner.get();
    ggml_cgraph *     g     = ggml_new_graph_custom(ctx, kMostTensors, false);
    ggml_tensor *     ids   = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, chain.n_used(), chain.n_tokens());
    ids->data               = slots_.data();
    ggml_tensor * experts   = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, chain.n_used(), chain.n_tokens());
    experts->data           = ids_.data();

    const Patches patches(graph, chain.begin, chain.end, saved_);
    int           first = chain.begin;
    if (chain.gate != nullptr && arena.pairs_with_next(binding_of(chain.gate->src[0])->place)) {
        ggml_tensor * w    = arena.view_pair(ctx, binding_of(chain.gate->src[0])->place, lowest, n_slot);
        ggml_tensor * both = ggml_mul_mat_id(ctx, w, chain.gate->src[1], ids);
        both->data         = scratch_.room(ggml_nbytes(both));
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

// What is resident computes while the rest arrives. Every pass writes its own rows of the chain's last node; all pairs of
// one expert are in one pass, so that the kernels see the same groups of rows at every budget. `summed`: nobody but the
// weighted sum reads the rows, so they stay in the order in which they are computed.
void ExpertFfn::run_passes(ggml_cgraph * graph, const FfnChain & chain, int end, LayerStep & step, Multiply how,
                           bool summed) {
    const int              stop   = summed ? end : chain.end;
    const size_t           row    = PassGraph::row_size(chain, graph, stop);
    const SlotArena &      arena  = *engine_->classes_[chain.layer().shape_class].arena;
    const ggml_tensor *    last   = ggml_graph_node(graph, stop - 1);
    auto *                 result = static_cast<char *>(last->data);
    std::vector<InputRows> inputs = input_rows(chain, last);
    if (summed) {
        row_of_.resize(ids_.size());
    }
    int32_t n_done = 0; // rows
    for (std::vector<uint32_t> experts = step.next(); !experts.empty(); experts = step.next()) {
        if (how == Multiply::ByExpert) { // hot ones first
            std::stable_sort(experts.begin(), experts.end(),
                             [this](uint32_t a, uint32_t b) { return groups_.count(a) > groups_.count(b); });
        }
        for (size_t i = 0; i < experts.size();) {
            const size_t most =
                how == Multiply::ByExpert && step.wants_slots() ? kMostActivationsInNeed : kMostActivations;
            std::vector<uint32_t> some;
            size_t                n_row = 0;
            for (; i < experts.size(); ++i) {
                const size_t more = n_row + groups_.count(experts[i]);
                const size_t span = how == Multiply::ByExpert || some.empty()
                                        ? 1
                                        : step.slot_of(experts[i]) - step.slot_of(some[0]) + 1;
                if (!some.empty() && (more * row > most || span * more * sizeof(int64_t) > kMostKernelWork)) {
                    break;
                }
                some.push_back(experts[i]);
                n_row = more;
            }
            PassGraph pass(
                chain, arena, [&step](uint32_t e) { return step.slot_of(e); }, groups_, some, how, tensors_, scratch_,
                graph, stop);
            for (const InputRows & x : inputs) {
                pass.gather(x);
            }
            if (summed) {
                pass.compute(result + n_done * last->nb[1]);
                for (uint32_t e : some) {
                    for (uint32_t k = 0; k < groups_.count(e); ++k) {
                        row_of_[groups_.pairs(e)[k]] = n_done++;
                    }
                }
            } else {
                pass.compute(nullptr);
                pass.scatter();
            }
            run(pass.graph());
            ++engine_->stats_.passes;
            step.computed(some);
        }
    }
    run_nodes(graph, stop, end);
}

// Where passes read the chain's inputs: in place, or from copies. Copied is what the first pass would overwrite, because the
// allocator gave its memory to the rows of `last`.
std::vector<InputRows> ExpertFfn::input_rows(const FfnChain & chain, const ggml_tensor * last) {
    size_t need = 0;
    for (int i = 0; i < chain.n_input; ++i) {
        need += Pieces::rounded(ggml_nelements(chain.inputs[i]) * sizeof(float));
    }
    Pieces                 pieces(inputs_, need);
    std::vector<InputRows> rows;
    for (int i = 0; i < chain.n_input; ++i) {
        const ggml_tensor * x    = chain.inputs[i];
        const size_t        size = x->ne[0] * sizeof(float);
        if (!overlap(x, last) && (x->ne[1] == 1 || x->nb[2] == x->nb[1] * x->ne[1])) {
            rows.push_back({x, x->data, x->ne[1] == 1 ? x->nb[2] : x->nb[1]});
            continue;
        }
        char * copy = pieces.take(ggml_nelements(x) * sizeof(float));
        rows.push_back({x, copy, size});
        for (int64_t t = 0; t < x->ne[2]; ++t) {
            for (int64_t r = 0; r < x->ne[1]; ++r, copy += size) {
                memcpy(copy, static_cast<const char *>(x->data) + t * x->nb[2] + r * x->nb[1], size);
            }
        }
    }
    return rows;
}

// The weighted sum; by all threads if it is long.
void ExpertFfn::add_up(const WeightedSum & sum) {
    const int64_t n_tokens = sum.rows->ne[2];
    const auto *  w        = static_cast<const float *>(sum.weights->data);
    weights_.assign(w, w + sum.rows->ne[1] * n_tokens); // they may lie where the sum goes
    const RankSum parts{sum, weights_.data(), row_of_.empty() ? nullptr : row_of_.data()};
    if (n_tokens <= kMostTokensSummed) {
        parts.compute(0, n_tokens);
        return;
    }
    const ContextPtr ctx = context_in(tensors_, 4);
    ggml_cgraph *    g   = ggml_new_graph_custom(ctx.get(), 4, false);
    const auto       all = [](ggml_tensor *, int ith, int nth, void * data) {
        const RankSum & mine = *static_cast<const RankSum *>(data);
        const int64_t   n    = mine.sum.rows->ne[2];
        mine.compute(n * ith / nth, n * (ith + 1) / nth);
    };
    ggml_tensor * node = ggml_custom_4d(ctx.get(), GGML_TYPE_F32, sum.out->ne[0], n_tokens, 1, 1, nullptr, 0, all,
                                        GGML_N_TASKS_MAX, const_cast<RankSum *>(&parts));
    node->data         = sum.out->data;
    node->flags |= GGML_TENSOR_FLAG_COMPUTE;
    ggml_graph_add_node(g, node);
    run(g);
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

} // namespace pye
