#include "gpu_stream.h"

#include "elapsed.h"
#include "error.h"
#include "pass_graph.h"
#include "rerun.h"

#include "ggml-impl.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>
#include <numeric>
#include <optional>

namespace pye {

namespace {

constexpr size_t kMostActivations = 256u << 20; // of one pass
// A piece is begun ahead if all experts were there at least so often; the mean of about ten tokens.
constexpr float kAhead = 0.5f, kFading = 0.9f;
constexpr int   kMostAside = 32; // nodes
// Where all experts are there this often, nobody needs to foresee any: it costs more than the few that are missing.
constexpr float kNothingToForesee = 0.95f;
// With so many (token, rank) pairs for each expert of a layer, nearly all experts are needed.
constexpr size_t kPairsForAll = 4;
// Predictors run on the processor: for more tokens than these they would take longer than what they save.
constexpr int64_t kMostTokensForeseen = 8;
// The CPU's kernels take a row at a time: of more tokens than these, moving an expert is cheaper than its rows.
constexpr int64_t kMostTokensOnHost = 32;

size_t ids_bytes(const FfnChain & chain) {
    return static_cast<size_t>(chain.n_used() * chain.n_tokens()) * sizeof(int32_t);
}

bool needs_all(const FfnChain & chain) {
    return static_cast<size_t>(chain.n_used() * chain.n_tokens()) >= kPairsForAll * chain.layer().n_expert;
}

// For a while, llama.cpp's nodes [begin, end) as they were.
template <class Patched> class Unpatched {
  public:
    Unpatched(ggml_cgraph * graph, int begin, int end, std::vector<Patched> & patched) {
        for (int n = begin; n < end; ++n) {
            for (Patched & p : patched) {
                if (p.node == ggml_graph_node(graph, n)) {
                    some_.push_back(&p);
                }
            }
        }
        swap();
    }
    ~Unpatched() { swap(); }
    Unpatched(const Unpatched &)             = delete;
    Unpatched & operator=(const Unpatched &) = delete;

  private:
    void swap() {
        for (Patched * p : some_) {
            std::swap(p->node->src[0], p->weight);
            std::swap(p->node->src[2], p->ids);
        }
    }
    std::vector<Patched *> some_;
};

// They stay in RAM until the CPU is done with them.
class PinnedInRam {
  public:
    PinnedInRam(RamTier * ram, uint32_t layer, std::vector<uint32_t> & experts)
        : ram_(ram), layer_(layer), experts_(experts) {
        experts_.clear();
    }
    ~PinnedInRam() {
        for (uint32_t e : experts_) {
            ram_->unpin(layer_, e);
        }
    }
    PinnedInRam(const PinnedInRam &)             = delete;
    PinnedInRam & operator=(const PinnedInRam &) = delete;

  private:
    RamTier *               ram_;
    uint32_t                layer_;
    std::vector<uint32_t> & experts_;
};

// llama.cpp's nodes are as they were on every way out.
template <class Patched> class Restored {
  public:
    explicit Restored(std::vector<Patched> & patched) : patched_(patched) { patched_.clear(); }
    ~Restored() {
        for (const Patched & p : patched_) {
            p.node->src[0] = p.weight;
            p.node->src[2] = p.ids;
        }
    }
    Restored(const Restored &)             = delete;
    Restored & operator=(const Restored &) = delete;

  private:
    std::vector<Patched> & patched_;
};

} // namespace

GpuStream::GpuStream(ggml_backend_t gpu)
    : gpu_(gpu, ggml_backend_free), host_(gpu), slots_(gpu), inputs_(gpu), saved_(gpu), told_(gpu), pass_(gpu),
      rows_(gpu) {
    ggml_backend_dev_t device = ggml_backend_get_device(gpu);
    for (Event * event : {&events_[0], &events_[1], &copied_[0], &copied_[1]}) {
        event->reset(ggml_backend_event_new(device));
    }
    copies_.reset(ggml_backend_dev_init(device, nullptr));
}

void GpuStream::set_abort_callback(ggml_abort_callback callback, void * data) {
    abort_      = callback;
    abort_data_ = data;
}

ggml_status GpuStream::compute(ggml_cgraph * graph) {
    Engine * const engine = engine_of(graph);
    if (engine == nullptr) {
        return ggml_backend_graph_compute_async(gpu_.get(), graph);
    }
    try {
        look_at(graph);
        const auto lock = engine->locked();
        engine->check_usable();
        engine_ = engine;
        if (chains_.empty()) {
            submit(graph);
        } else {
            run(graph);
        }
        if (ends_early_) {
            engine->recording_.without_output();
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

// The expert FFNs of a graph. Looking at every node's readers takes its time, for whole graphs have many.
void GpuStream::look_at(ggml_cgraph * graph) {
    if (graph->uid != 0 && graph->uid == chains_uid_) {
        return;
    }
    chains_uid_ = 0;
    find_chains(graph, &chains_);
    // llama.cpp drops tokens without output before the last layer, which can leave none: nodes without rows compute nothing.
    const auto none =
        std::remove_if(chains_.begin(), chains_.end(), [](const FfnChain & c) { return c.n_tokens() == 0; });
    ends_early_ = none != chains_.end();
    chains_.erase(none, chains_.end());
    chains_uid_ = graph->uid;
}

void GpuStream::run(ggml_cgraph * graph) {
    if (unsettled_) { // the last one was left by an exception
        ggml_backend_synchronize(gpu_.get());
        ggml_backend_synchronize(copies_.get());
        unsettled_ = false;
    }
    choose_form(graph);
    const Restored<Patched> restored(patched_);
    for (size_t i = 0; i < chains_.size(); ++i) {
        engine_->count_ffn(chains_[i].binding->layer);
        if (ffns_[i].whole) {
            patch(graph, i);
            ++engine_->stats_.passes;
            // Of several tokens nobody asked which.
            engine_->stats_.hits += alone_ ? static_cast<uint64_t>(chains_[i].n_used()) : 0;
        }
    }
    if (partly_.empty()) {
        compute_nodes(graph, 0, ggml_graph_n_nodes(graph));
        if (std::find(engine_->streams_.begin(), engine_->streams_.end(), gpu_) == engine_->streams_.end()) {
            engine_->streams_.push_back(gpu_);
        }
    } else if (alone_) {
        run_token(graph);
    } else {
        run_tokens(graph);
    }
}

void GpuStream::run_token(ggml_cgraph * graph) {
    std::optional<LayerStep> computing; // its experts are pinned until the GPU is done with them
    std::optional<size_t>    heard;     // whose router has spoken; what follows from it waits until the GPU has work
    for (size_t i : partly_) {
        patch(graph, i);
    }
    const auto ask = [&](size_t k, bool told) { // the router of partly_[k]
        if (k < partly_.size()) {
            if (!told) {
                submit(ffns_[partly_[k]].tell);
            }
            ask_told(k);
        }
    };
    unsettled_ = true;
    compute_nodes(graph, 0, chains_[partly_[0]].begin);
    ask(0, false);
    for (size_t k = 0; k < partly_.size(); ++k) {
        const size_t     i     = partly_[k];
        const FfnChain & chain = chains_[i];
        float &          here  = here_[chain.binding->layer];
        const bool       ahead = here >= kAhead && ffns_[i].back.graph != nullptr;
        if (ahead) {
            begin_ahead(graph, i);
            ask(k + 1, true);
            ++engine_->stats_.begun_ahead;
        }
        if (heard) {
            look_ahead(*heard);
        }
        wait_for(k);
        computing.reset();
        hear_router(i);
        heard = i;
        const PinnedInRam pinned(engine_->ram_.get(), chain.binding->layer, on_host_);
        const PinnedInRam also_pinned(engine_->ram_.get(), chain.binding->layer, tried_);
        computing.emplace(*engine_, chain.binding->layer, wanted_,
                          [&](std::vector<Wanted> * missing) { share_out(i, missing); });
        if (!tried_.empty()) { // meanwhile it comes, too
            time_on_host(graph, i, tried_);
        }
        const bool all_here = computing->all_resident();
        here                = kFading * here + (all_here && on_host_.empty() ? 1.0f - kFading : 0.0f);
        ++engine_->stats_.passes;
        const bool right = ahead && on_host_.empty() && was_right(chain, *computing);
        if (!all_here && !on_host_.empty()) { // meanwhile the others come
            compute_on_host(graph, i);
        }
        while (!computing->next().empty()) {
        }
        if (right) {
            continue;
        }
        if (ahead) {
            ++engine_->stats_.computed_again;
            if (k + 1 < partly_.size()) { // the next router's word comes again, to the same place
                if (copied_[(k + 1) % 2]) {
                    ggml_backend_event_wait(gpu_.get(), copied_[(k + 1) % 2].get());
                } else {
                    ggml_backend_synchronize(copies_.get());
                }
            }
            submit(ffns_[i].back);
        }
        put_slots(i, *computing);
        int from = chain.begin;
        if (!on_host_.empty()) {
            compute_nodes(graph, chain.begin, chain.end);
            from = chain.end;
            if (all_here) { // meanwhile the GPU computes the others
                compute_on_host(graph, i);
            }
            send_rows(graph, i);
        }
        compute_nodes(graph, from, end_of_piece(graph, k));
        ask(k + 1, false);
    }
    look_ahead(*heard);
    ggml_backend_synchronize(gpu_.get());
    ++engine_->stats_.syncs;
    unsettled_ = false;
}

void GpuStream::run_tokens(ggml_cgraph * graph) {
    std::optional<LayerStep> computing;
    std::optional<size_t>    heard;
    int                      done = 0; // nodes
    const auto               wait = [&] {
        ggml_backend_synchronize(gpu_.get());
        ++engine_->stats_.syncs;
        computing.reset();
    };
    for (size_t i : partly_) {
        const FfnChain & chain = chains_[i];
        compute_nodes(graph, done, chain.begin);
        done = chain.begin;
        ask_router(i);
        if (heard) {
            look_ahead(*heard);
        }
        wait();
        hear_router(i);
        heard = i;
        const PinnedInRam pinned(engine_->ram_.get(), chain.binding->layer, on_host_);
        const PinnedInRam also_pinned(engine_->ram_.get(), chain.binding->layer, tried_);
        computing.emplace(*engine_, chain.binding->layer, wanted_,
                          [&](std::vector<Wanted> * missing) { share_out(i, missing); });
        if (!tried_.empty()) { // meanwhile it comes, too
            time_on_host(graph, i, tried_);
        }
        if (!on_host_.empty()) {
            compute_on_host(graph, i);
        }
        if (computing->wants_slots()) {
            compute_in_passes(graph, chain, *computing);
            computing.reset();
            done = chain.end;
        } else {
            while (!computing->next().empty()) {
            }
            if (needs_all(chain)) {
                computing->pass_on();
            }
            put_slots(i, *computing);
            patch(graph, i);
            ++engine_->stats_.passes;
        }
        if (!on_host_.empty()) {
            compute_nodes(graph, done, chain.end);
            send_rows(graph, i);
            done = chain.end;
        }
    }
    compute_nodes(graph, done, ggml_graph_n_nodes(graph));
    look_ahead(*heard);
    wait();
}

// Which layers need their router's word, and what follows from it, if it is not as the last time.
void GpuStream::choose_form(ggml_cgraph * graph) {
    alone_ = chains_[0].n_tokens() == 1;
    std::vector<uint64_t> form{graph->uid, engine_->generation_, static_cast<uint64_t>(chains_[0].n_tokens()),
                               static_cast<uint64_t>(engine_->replay_.active())};
    ffns_.resize(chains_.size());
    here_.resize(engine_->index_.layers.size(), 0.0f);
    partly_.clear();
    for (size_t i = 0; i < chains_.size(); ++i) {
        const FfnChain & chain = chains_[i];
        ffns_[i].whole         = is_whole(chain);
        if (!ffns_[i].whole) {
            partly_.push_back(i);
        }
        form.push_back(static_cast<uint64_t>(chain.begin) << 3 | static_cast<uint64_t>(foresees(chain)) << 2 |
                       static_cast<uint64_t>(may_compute_on_host(chain)) << 1 | static_cast<uint64_t>(ffns_[i].whole));
    }
    // Where several tokens meet some experts, each time other slots are spanned.
    if (graph->uid == 0 || (!partly_.empty() && !alone_) || form != form_) {
        pieces_.clear();
        form_.clear(); // if laying out fails, nothing is laid out
        lay_out(graph);
        form_ = form;
    }
}

// Of the piece that begins with the experts of partly_[k].
int GpuStream::end_of_piece(ggml_cgraph * graph, size_t k) const {
    return k + 1 < partly_.size() ? chains_[partly_[k + 1]].begin : ggml_graph_n_nodes(graph);
}

bool GpuStream::is_whole(const FfnChain & chain) const {
    if (engine_->recording_.on()) {
        return false;
    }
    const ExpertLayer & layer = chain.layer();
    const SlotStore &   store = *engine_->classes_[layer.shape_class].store;
    if (store.n_slot() < engine_->index_.classes[layer.shape_class].n_expert) {
        return false;
    }
    for (uint32_t e = layer.first; e < layer.first + layer.n_expert; ++e) {
        if (store.slot_of(e) != e || !store.ready(e)) {
            return false;
        }
    }
    return true;
}

bool GpuStream::foresees(const FfnChain & chain) const {
    return (alone_ && engine_->recording_.wants_inputs()) ||
           (chain.n_tokens() <= kMostTokensForeseen && !engine_->replay_.active() &&
            engine_->prefetcher_->listens(chain.binding->layer));
}

bool GpuStream::may_compute_on_host(const FfnChain & chain) const {
    return engine_->share_.threads() > 0 && engine_->ram_->n_slot() > 0 && chain.n_tokens() <= kMostTokensOnHost &&
           !needs_all(chain) && std::all_of(chain.inputs, chain.inputs + chain.n_input, ggml_is_contiguous);
}

// Tensors and scratch memory for this graph.
void GpuStream::lay_out(ggml_cgraph * graph) {
    size_t     n_weight = 0, host = 0, device = 0, rows = 0;
    const auto n_wanted = [&](const FfnChain & chain) { // inputs
        return may_compute_on_host(chain) ? chain.n_input : static_cast<int>(foresees(chain));
    };
    for (const FfnChain & chain : chains_) {
        const size_t ids = ids_bytes(chain);
        for (int k = 0; k < n_wanted(chain); ++k) {
            host += Pieces::rounded(ggml_nbytes(chain.inputs[k]));
        }
        if (may_compute_on_host(chain)) {
            rows = std::max(rows, ggml_nbytes(ggml_graph_node(graph, chain.end - 1)));
        }
        n_weight += static_cast<size_t>(chain.end - chain.begin);
        const size_t table = alone_ ? Pieces::rounded(chain.layer().n_expert * sizeof(int32_t)) : 0;
        host += Pieces::rounded(ggml_nbytes(chain.ids)) + 2 * Pieces::rounded(ids) + table;
        device += Pieces::rounded(ids) + table;
    }
    host_.reserve(host);
    slots_.reserve(device);
    rows_.reserve(rows);
    Pieces on_host(host_.base()), on_device(slots_.base());
    tensors_.reset();
    tensors_ = context_in(memory_, n_weight + 2 * chains_.size());
    weights_.clear();
    first_weight_.clear();
    for (size_t i = 0; i < chains_.size(); ++i) {
        const FfnChain &    chain = chains_[i];
        const ExpertLayer & layer = chain.layer();
        const auto &        k     = engine_->classes_[layer.shape_class];
        if (k.memory == nullptr) {
            throw Error(PYE_E_MEMORY, "there is no GPU memory for experts");
        }
        first_weight_.push_back(weights_.size());
        for (int n = chain.begin; n < chain.end; ++n) {
            const ggml_tensor * node = ggml_graph_node(graph, n);
            if (is_expert_matmul(node)) {
                const uint32_t place = binding_of(node->src[0])->place;
                weights_.push_back(ffns_[i].whole ? k.memory->view(tensors_.get(), place, layer.first, layer.n_expert)
                                                  : k.memory->view(tensors_.get(), place, 0, k.store->n_slot()));
            }
        }
        Ffn & ffn   = ffns_[i];
        ffn.slots   = ggml_new_tensor_2d(tensors_.get(), GGML_TYPE_I32, chain.n_used(), chain.n_tokens());
        ffn.ids     = on_host.take(ggml_nbytes(chain.ids));
        ffn.numbers = on_host.take(ids_bytes(chain));
        ffn.on_host = may_compute_on_host(chain);
        ffn.inputs  = {};
        for (int input = 0; input < n_wanted(chain); ++input) {
            ffn.inputs[static_cast<size_t>(input)] = on_host.take(ggml_nbytes(chain.inputs[input]));
        }

        ffn.slots->data   = on_device.take(ids_bytes(chain));
        ffn.slots->buffer = slots_.buffer();
        ffn.back          = {};
        if (alone_) {
            const size_t size = layer.n_expert * sizeof(int32_t);
            ffn.table         = ggml_new_tensor_2d(tensors_.get(), GGML_TYPE_I32, 1, layer.n_expert);
            ffn.table->data   = on_device.take(size);
            ffn.table->buffer = slots_.buffer();
            ffn.table_here    = on_host.take(size);
            ffn.table_sent    = false;
            ffn.guessed       = on_host.take(ids_bytes(chain));
        }
    }
    if (alone_ && !partly_.empty()) {
        prepare_repeats(graph);
    }
}

// What goes beside llama.cpp's nodes. Before every layer: what its router says and sees is kept where nothing overwrites it.
// For every piece that can be computed twice: the piece with nodes before it that save what it will overwrite, and turn ids
// into slots, and a graph that puts it back.
void GpuStream::prepare_repeats(ggml_cgraph * graph) {
    const size_t                          n = partly_.size();
    std::vector<std::vector<MemoryRange>> told(n), saved(n), back(n);
    size_t                                n_saved = 0, n_told = 0, n_tensor = 0;
    const auto                            size_of = [](const std::vector<MemoryRange> & ranges) {
        return std::accumulate(ranges.begin(), ranges.end(), size_t{0},
                               [](size_t sum, const MemoryRange & r) { return sum + r.size; });
    };
    for (size_t k = 0; k < n; ++k) {
        const FfnChain & chain = chains_[partly_[k]];
        Ffn &            ffn   = ffns_[partly_[k]];
        for (size_t x = 0; x < ffn.inputs.size() && ffn.inputs[x] != nullptr; ++x) {
            told[k].push_back(range_of(chain.inputs[x]));
        }
        told[k].push_back(range_of(chain.ids));
        n_told += Pieces::rounded(size_of(told[k]));
        n_tensor += 4 * told[k].size();
        const int begin = chain.begin, end = end_of_piece(graph, k);
        back[k] = overwritten_inputs(graph, begin, end);
        if (!can_be_repeated(graph, begin, end) || back[k].size() > kMostAside ||
            std::any_of(back[k].begin(), back[k].end(),
                        [](const MemoryRange & r) { return r.size % sizeof(float) != 0; })) {
            continue;
        }
        for (const MemoryRange & r : back[k]) {
            if (std::none_of(told[k].begin(), told[k].end(), [&r](const MemoryRange & t) { return same(r, t); })) {
                saved[k].push_back(r);
            }
        }
        n_saved += Pieces::rounded(size_of(saved[k]));
        n_tensor += 8 * back[k].size() + 4;
        ffn.back.uid = ggml_graph_next_uid(); // to be made
    }
    saved_.reserve(std::max<size_t>(n_saved, 1));
    told_.reserve(std::max<size_t>(n_told, 1));
    Pieces saved_room(saved_.base()), told_room(told_.base());
    asides_.reset();
    const size_t graphs = 2 * n * (ggml_graph_overhead_custom(kMostAside, false) + 64);
    aside_memory_.resize(std::max(aside_memory_.size(), n_tensor * ggml_tensor_overhead() + graphs));
    asides_            = ContextPtr(ggml_init({aside_memory_.size(), aside_memory_.data(), /*no_alloc=*/true}));
    ggml_context * ctx = asides_.get();
    const auto     raw = [ctx](char * at, size_t bytes, ggml_backend_buffer_t buffer) {
        ggml_tensor * t = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, static_cast<int64_t>(bytes / sizeof(float)));
        t->data         = at;
        t->buffer       = buffer;
        return t;
    };
    const auto theirs = [&](const MemoryRange & r) { return raw(r.begin, r.size, r.buffer); };
    const auto node   = [](ggml_tensor * t, const ggml_tensor * at) {
        t->data   = at->data;
        t->buffer = at->buffer;
        t->flags |= GGML_TENSOR_FLAG_COMPUTE;
        return t;
    };
    // Copies of the ranges, one behind the other; two at a time, which is one kernel.
    const auto keep = [&](const std::vector<MemoryRange> & ranges, char * to, ggml_backend_buffer_t buffer) {
        std::vector<ggml_tensor *> nodes;
        for (size_t i = 0; i < ranges.size(); i += 2) {
            const bool    two  = i + 1 < ranges.size();
            const size_t  size = ranges[i].size + (two ? ranges[i + 1].size : 0);
            ggml_tensor * ours = raw(to, size, buffer);
            nodes.push_back(node(two ? ggml_concat(ctx, theirs(ranges[i]), theirs(ranges[i + 1]), 0)
                                     : ggml_cpy(ctx, theirs(ranges[i]), ours),
                                 ours));
            to += size;
        }
        return nodes;
    };
    const auto place_in = [](const std::vector<MemoryRange> & ranges, const MemoryRange & r, size_t * at) {
        *at = 0;
        for (const MemoryRange & one : ranges) {
            if (same(one, r)) {
                return true;
            }
            *at += one.size;
        }
        return false;
    };
    std::vector<std::vector<ggml_tensor *>> telling(n);
    for (size_t k = 0; k < n; ++k) {
        Ffn &  ffn  = ffns_[partly_[k]];
        char * at   = told_room.take(size_of(told[k]));
        telling[k]  = keep(told[k], at, told_.buffer());
        ffn.tell    = {ggml_new_graph_custom(ctx, kMostAside, false), ggml_graph_next_uid()};
        ffn.told_at = at;
        for (ggml_tensor * t : telling[k]) {
            ggml_graph_add_node(ffn.tell.graph, t);
        }
    }
    for (size_t k = 0; k < n; ++k) {
        const FfnChain & chain = chains_[partly_[k]];
        Ffn &            ffn   = ffns_[partly_[k]];
        if (ffn.back.uid == 0) {
            continue;
        }
        char * at      = saved_room.take(size_of(saved[k]));
        ffn.ahead      = keep(saved[k], at, saved_.buffer());
        ffn.back.graph = ggml_new_graph_custom(ctx, kMostAside, false);
        for (const MemoryRange & r : back[k]) {
            size_t        offset;
            ggml_tensor * ours = place_in(saved[k], r, &offset)  ? raw(at + offset, r.size, saved_.buffer())
                                 : place_in(told[k], r, &offset) ? raw(ffn.told_at + offset, r.size, told_.buffer())
                                                                 : nullptr;
            GGML_ASSERT(ours != nullptr);
            ggml_tensor * its = theirs(r);
            ggml_graph_add_node(ffn.back.graph, node(ggml_cpy(ctx, ours, its), its));
        }
        if (!engine_->replay_.active()) {
            ggml_tensor * ids = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, chain.n_used());
            node(ids, chain.ids);
            ffn.ahead.push_back(node(ggml_get_rows(ctx, ffn.table, ids), ffn.slots));
        }
        for (int i = chain.begin; i < end_of_piece(graph, k); ++i) {
            ffn.ahead.push_back(ggml_graph_node(graph, i));
        }
        if (k + 1 < n) {
            ffn.ahead.insert(ffn.ahead.end(), telling[k + 1].begin(), telling[k + 1].end());
        }
        ffn.ahead_uid = ggml_graph_next_uid();
    }
}

// Slots in the place of the model's tensors.
void GpuStream::patch(ggml_cgraph * graph, size_t i) {
    size_t next = first_weight_[i];
    for (int n = chains_[i].begin; n < chains_[i].end; ++n) {
        ggml_tensor * node = ggml_graph_node(graph, n);
        if (is_expert_matmul(node)) {
            patched_.push_back({node, node->src[0], node->src[2]});
            node->src[0] = weights_[next++];
            node->src[2] = ffns_[i].whole ? node->src[2] : ffns_[i].slots;
        }
    }
}

void GpuStream::compute_nodes(ggml_cgraph * graph, int begin, int end) {
    if (begin >= end) {
        return;
    }
    ggml_cgraph part = ggml_graph_view(graph, begin, end);
    if (graph->uid != 0) {
        auto piece = std::find_if(pieces_.begin(), pieces_.end(),
                                  [&](const Piece & p) { return p.begin == begin && p.end == end; });
        if (piece == pieces_.end()) {
            piece = pieces_.insert(piece, {begin, end, ggml_graph_next_uid()});
        }
        part.uid = piece->uid;
    }
    submit(&part);
}

void GpuStream::submit(ggml_cgraph * graph) {
    if (abort_ != nullptr && abort_(abort_data_)) {
        throw Aborted{};
    }
    const ggml_status status = ggml_backend_graph_compute_async(gpu_.get(), graph);
    if (status == GGML_STATUS_ABORTED) {
        throw Aborted{};
    }
    if (status != GGML_STATUS_SUCCESS) {
        throw Error(PYE_E_MEMORY, std::string(ggml_backend_name(gpu_.get())) + " could not compute (out of memory?)");
    }
}

void GpuStream::submit(const Aside & aside) {
    if (ggml_graph_n_nodes(aside.graph) > 0) {
        aside.graph->uid = aside.uid;
        submit(aside.graph);
    }
}

// The next piece begins before its ids are known here.
void GpuStream::begin_ahead(ggml_cgraph * graph, size_t i) {
    Ffn &               ffn   = ffns_[i];
    const ExpertLayer & layer = chains_[i].layer();
    const SlotStore &   store = *engine_->classes_[layer.shape_class].store;
    at_begin_.resize(layer.n_expert);
    begun_           = store.now();
    auto * table     = reinterpret_cast<int32_t *>(ffn.table_here);
    bool   as_before = ffn.table_sent;
    for (uint32_t e = 0; e < layer.n_expert; ++e) {
        at_begin_[e]    = store.ready(layer.first + e) ? store.slot_of(layer.first + e) : SlotStore::kNone;
        const auto slot = static_cast<int32_t>(at_begin_[e] == SlotStore::kNone ? 0 : at_begin_[e]);
        as_before       = as_before && table[e] == slot;
        table[e]        = slot;
    }
    if (!as_before) {
        ggml_backend_tensor_set_async(gpu_.get(), ffn.table, table, 0, layer.n_expert * sizeof(int32_t));
        ffn.table_sent = true;
    }
    if (engine_->replay_.active()) { // then the ids are known, though not from the router
        const std::vector<int32_t> ids     = engine_->replay_.next(chains_[i].binding->layer);
        auto *                     guessed = reinterpret_cast<int32_t *>(ffn.guessed);
        for (size_t r = 0; r < ids.size(); ++r) {
            guessed[r] = table[ids[r]];
        }
        ggml_backend_tensor_set_async(gpu_.get(), ffn.slots, guessed, 0, ids.size() * sizeof(int32_t));
    }
    ggml_cgraph piece = ggml_graph_view(graph, 0, 0);
    piece.nodes       = ffn.ahead.data();
    piece.n_nodes     = static_cast<int>(ffn.ahead.size());
    piece.uid         = graph->uid != 0 ? ffn.ahead_uid : 0;
    submit(&piece);
}

// Whether what was begun ahead has found all experts of its token where they were, and still are.
bool GpuStream::was_right(const FfnChain & chain, const LayerStep & step) const {
    const SlotStore & store = *engine_->classes_[chain.layer().shape_class].store;
    return step.all_resident() && std::all_of(wanted_.begin(), wanted_.end(), [&](const Wanted & w) {
               const uint32_t slot = step.slot_of(w.expert);
               return at_begin_[w.expert] == slot && store.filled(slot) <= begun_;
           });
}

void GpuStream::wait_for(size_t k) {
    if (copied_[k % 2]) {
        ggml_backend_event_synchronize(copied_[k % 2].get());
    } else {
        ggml_backend_synchronize(copies_.get());
    }
    ++engine_->stats_.syncs;
}

bool GpuStream::wants_its_inputs(size_t i) const {
    const Ffn &    ffn   = ffns_[i];
    const uint32_t layer = chains_[i].binding->layer;
    return ffn.inputs[0] != nullptr && ((alone_ && engine_->recording_.wants_inputs()) || much_is_missing(layer + 1) ||
                                        (ffn.on_host && (!alone_ || much_is_missing(layer))));
}

// What the router has chosen, and seen, is copied as soon as it is there.
void GpuStream::ask_router(size_t i) {
    const FfnChain & chain = chains_[i];
    Ffn &            ffn   = ffns_[i];
    ggml_backend_tensor_get_async(gpu_.get(), chain.ids, ffn.ids, 0, ggml_nbytes(chain.ids));
    ffn.asked = wants_its_inputs(i);
    for (size_t k = 0; ffn.asked && k < ffn.inputs.size() && ffn.inputs[k] != nullptr; ++k) {
        ggml_backend_tensor_get_async(gpu_.get(), chain.inputs[k], ffn.inputs[k], 0, ggml_nbytes(chain.inputs[k]));
    }
}

// The same from where it was kept: beside the next piece, which need not wait for it.
void GpuStream::ask_told(size_t k) {
    Ffn &            ffn   = ffns_[partly_[k]];
    const FfnChain & chain = chains_[partly_[k]];
    if (events_[k % 2]) {
        ggml_backend_event_record(events_[k % 2].get(), gpu_.get());
        ggml_backend_event_wait(copies_.get(), events_[k % 2].get());
    } else {
        ggml_backend_synchronize(gpu_.get());
    }
    ffn.asked       = wants_its_inputs(partly_[k]);
    char *     at   = ffn.told_at;
    const auto copy = [&](size_t size, char * to) {
        ggml_tensor t = bytes_at(told_.buffer(), at, size);
        ggml_backend_tensor_get_async(copies_.get(), &t, to, 0, size);
    };
    for (size_t x = 0; x < ffn.inputs.size() && ffn.inputs[x] != nullptr; ++x) {
        const size_t size = ggml_nbytes(chain.inputs[x]);
        if (ffn.asked) {
            copy(size, ffn.inputs[x]);
        }
        at += size;
    }
    copy(ggml_nbytes(chain.ids), ffn.ids);
    if (copied_[k % 2]) {
        ggml_backend_event_record(copied_[k % 2].get(), copies_.get());
    }
}

bool GpuStream::much_is_missing(uint32_t layer) const {
    return layer >= here_.size() || here_[layer] < kNothingToForesee;
}

void GpuStream::hear_router(size_t i) {
    const FfnChain & chain    = chains_[i];
    const uint32_t   n_expert = chain.layer().n_expert;
    const auto       n_used   = static_cast<size_t>(chain.n_used());
    ids_.resize(n_used * static_cast<size_t>(chain.n_tokens()));
    for (size_t t = 0; t * n_used < ids_.size(); ++t) {
        for (size_t r = 0; r < n_used; ++r) {
            memcpy(&ids_[t * n_used + r], ffns_[i].ids + t * chain.ids->nb[1] + r * chain.ids->nb[0], sizeof(int32_t));
        }
    }
    engine_->hear(chain.binding->layer, &ids_);
    groups_.assign(ids_, n_expert);
    wanted_.clear();
    for (uint32_t e = 0; e < n_expert; ++e) {
        if (groups_.count(e) != 0) {
            wanted_.push_back({e, groups_.count(e)});
        }
    }
}

// Slot numbers in the place of expert ids. Several tokens: counted from the lowest slot, for the kernels work through all
// between the lowest and the highest. What the CPU computes is any slot here that its token does not use otherwise.
void GpuStream::put_slots(size_t i, const LayerStep & step) {
    const auto n_used = static_cast<size_t>(chains_[i].n_used());
    uint32_t   lowest = 0;
    if (!alone_) {
        uint32_t highest = 0;
        lowest           = UINT32_MAX;
        for (const Wanted & w : wanted_) {
            if (!is_on_host(w.expert)) {
                lowest  = std::min(lowest, step.slot_of(w.expert));
                highest = std::max(highest, step.slot_of(w.expert));
            }
        }
        if (!on_host_.empty()) {
            const SlotStore & store = *engine_->classes_[chains_[i].layer().shape_class].store;
            lowest                  = std::min(lowest, highest);
            highest = std::max(highest, static_cast<uint32_t>(std::min<size_t>(store.n_slot(), lowest + n_used) - 1));
            lowest  = std::min(lowest, highest - static_cast<uint32_t>(n_used - 1));
        }
        const size_t end = i + 1 < chains_.size() ? first_weight_[i + 1] : weights_.size();
        for (size_t w = first_weight_[i]; w < end; ++w) {
            ggml_tensor * t = weights_[w];
            t->data         = static_cast<char *>(t->data) + lowest * t->nb[2];
            t->ne[2]        = highest - lowest + 1;
            t->nb[3]        = t->nb[2] * static_cast<size_t>(t->ne[2]);
        }
    }
    auto * numbers = reinterpret_cast<int32_t *>(ffns_[i].numbers);
    for (size_t first = 0; first < ids_.size(); first += n_used) {
        int32_t *  of_token = numbers + first;
        const auto id       = [&](size_t rank) { return static_cast<uint32_t>(ids_[first + rank]); };
        for (size_t rank = 0; rank < n_used; ++rank) {
            of_token[rank] = is_on_host(id(rank)) ? -1 : static_cast<int32_t>(step.slot_of(id(rank)) - lowest);
        }
        int32_t unused = 0;
        for (size_t rank = 0; rank < n_used; ++rank) {
            if (of_token[rank] < 0) {
                while (std::find(of_token, of_token + n_used, unused) != of_token + n_used) {
                    ++unused;
                }
                of_token[rank] = unused;
            }
        }
    }
    ggml_backend_tensor_set_async(gpu_.get(), ffns_[i].slots, numbers, 0, ids_.size() * sizeof(int32_t));
}

bool GpuStream::is_on_host(uint32_t expert) const {
    return std::find(on_host_.begin(), on_host_.end(), expert) != on_host_.end();
}

// Takes from the missing what the CPU shall compute: those with the fewest rows and, of these, the ones whose place in VRAM is
// worth least.
void GpuStream::share_out(size_t i, std::vector<Wanted> * missing) {
    const uint32_t      layer = chains_[i].binding->layer;
    const ExpertLayer & l     = chains_[i].layer();
    const SlotStore &   store = *engine_->classes_[l.shape_class].store;
    if (!ffns_[i].on_host || !ffns_[i].asked || wanted_.size() > store.n_slot()) {
        return;
    }
    std::vector<HostShare::Missing> candidates;
    for (const Wanted & w : *missing) {
        if (engine_->ram_->holds(layer, w.expert)) {
            const uint32_t slot = store.slot_of(l.first + w.expert);
            candidates.push_back(
                {w.expert, w.pairs, slot == SlotStore::kNone ? 1.0f : engine_->source_->unread(layer, slot)});
        }
    }
    using Missing = HostShare::Missing;
    std::sort(candidates.begin(), candidates.end(), [&](const Missing & a, const Missing & b) {
        return a.pairs != b.pairs     ? a.pairs < b.pairs
               : a.unread != b.unread ? a.unread > b.unread
                                      : store.priority(l.first + a.expert) < store.priority(l.first + b.expert);
    });
    const double speed = engine_->link_.bytes_per_ns();
    const double move  = speed > 0.0 ? static_cast<double>(engine_->index_.classes[l.shape_class].stride) / speed : 0.0;
    // Others must come from disk. What is moved for later layers is in their way, half done on average.
    const double others = static_cast<double>(missing->size() - candidates.size()) +
                          0.5 * static_cast<double>(engine_->prefetcher_->n_under_way());
    HostShare &  share  = engine_->share_;
    if (!candidates.empty() && move > 0.0 && share.trial_due()) {
        engine_->ram_->pin(layer, candidates[0].expert);
        tried_.push_back(candidates[0].expert);
        return;
    }
    const size_t n = share.how_many(candidates, others, move);
    for (size_t k = 0; k < n; ++k) {
        engine_->ram_->pin(layer, candidates[k].expert);
        on_host_.push_back(candidates[k].expert);
    }
    missing->erase(
        std::remove_if(missing->begin(), missing->end(), [this](const Wanted & w) { return is_on_host(w.expert); }),
        missing->end());
}

// In host memory: rows_, in the order of on_host_ from then on.
void GpuStream::compute_on_host(ggml_cgraph * graph, size_t i) {
    const auto start = std::chrono::steady_clock::now();
    engine_->stats_.host_pairs += time_on_host(graph, i, on_host_);
    engine_->stats_.host_ns += nanoseconds_since(start);
    engine_->timeline_.until_now(PYE_SPAN_COMPUTE, chains_[i].binding->layer, start);
}

// The rows of these experts, which get their order, to rows_. Returns how many.
uint32_t GpuStream::time_on_host(ggml_cgraph * graph, size_t i, std::vector<uint32_t> & experts) {
    const auto                start = std::chrono::steady_clock::now();
    const FfnChain &          chain = chains_[i];
    std::vector<const char *> inputs(ffns_[i].inputs.begin(), ffns_[i].inputs.end());
    const Unpatched<Patched>  as_it_was(graph, chain.begin, chain.end, patched_);
    experts         = host_ffn_.compute(chain, graph, *engine_->ram_, groups_, experts, inputs, rows_.base(),
                                        engine_->share_.threads());
    uint32_t n_pair = 0;
    for (uint32_t e : experts) {
        n_pair += groups_.count(e);
    }
    engine_->share_.computed(n_pair, nanoseconds_since(start));
    return n_pair;
}

// The CPU's rows to where the GPU has put others.
void GpuStream::send_rows(ggml_cgraph * graph, size_t i) {
    const FfnChain & chain = chains_[i];
    ggml_tensor *    last  = ggml_graph_node(graph, chain.end - 1);
    const size_t     size  = static_cast<size_t>(last->ne[0]) * sizeof(float);
    const char *     row   = rows_.base();
    for (uint32_t e : on_host_) {
        for (uint32_t k = 0; k < groups_.count(e); ++k, row += size) {
            const auto   pair = static_cast<size_t>(groups_.pairs(e)[k]), n_used = static_cast<size_t>(chain.n_used());
            const size_t at = pair / n_used * last->nb[2] + pair % n_used * last->nb[1];
            ggml_backend_tensor_set_async(gpu_.get(), last, row, at, size);
        }
        engine_->prefetcher_->promote(chain.binding->layer, e);
    }
}

void GpuStream::look_ahead(size_t i) {
    const FfnChain & chain = chains_[i];
    gate_inputs_.clear();
    if (ffns_[i].asked) {
        for (int64_t t = 0; t < chain.n_tokens(); ++t) {
            gate_inputs_.push_back(
                reinterpret_cast<const float *>(ffns_[i].inputs[0] + static_cast<size_t>(t) * chain.inputs[0]->nb[2]));
        }
    }
    engine_->look_ahead(chain.binding->layer, ids_, nullptr, gate_inputs_, chain.n_tokens());
    if (i + 1 < chains_.size() && needs_all(chains_[i + 1])) {
        engine_->prefetcher_->stream(chains_[i + 1].binding->layer);
    }
}

// More experts than there are slots: as many at a time as fit, all rows of each, as on the CPU.
void GpuStream::compute_in_passes(ggml_cgraph * graph, const FfnChain & chain, LayerStep & step) {
    size_t size = 0;
    for (int k = 0; k < chain.n_input; ++k) {
        size += Pieces::rounded(ggml_nelements(chain.inputs[k]) * sizeof(float));
    }
    inputs_.reserve(size);
    Pieces                 pieces(inputs_.base());
    std::vector<InputRows> inputs;
    // Copies, for the allocator may have given an input's memory to the result.
    {
        const ContextPtr ctx    = context_in(pass_tensors_, FfnChain::kMostInputs);
        ggml_cgraph *    copies = ggml_new_graph_custom(ctx.get(), FfnChain::kMostInputs, false);
        for (int k = 0; k < chain.n_input; ++k) {
            auto *        x    = const_cast<ggml_tensor *>(chain.inputs[k]);
            ggml_tensor * copy = ggml_cont(ctx.get(), x);
            copy->data         = pieces.take(ggml_nbytes(copy));
            copy->buffer       = inputs_.buffer();
            copy->flags |= GGML_TENSOR_FLAG_COMPUTE;
            ggml_graph_add_node(copies, copy);
            inputs.push_back({x, copy->data, x->ne[0] * sizeof(float), inputs_.buffer()});
        }
        submit(copies);
    }
    const SlotMemory & slots = *engine_->classes_[chain.layer().shape_class].memory;
    const size_t       row   = PassGraph::row_size(chain, graph, chain.end);
    for (std::vector<uint32_t> experts = step.next(); !experts.empty(); experts = step.next()) {
        for (size_t k = 0; k < experts.size();) {
            std::vector<uint32_t> some;
            for (size_t n_row = 0; k < experts.size(); ++k) {
                n_row += groups_.count(experts[k]);
                if (!some.empty() && n_row * row > kMostActivations) {
                    break;
                }
                some.push_back(experts[k]);
            }
            PassGraph pass(
                chain, slots, [&step](uint32_t e) { return step.slot_of(e); }, groups_, some, Multiply::ByRow,
                pass_tensors_, pass_, graph, chain.end);
            for (const InputRows & x : inputs) {
                pass.gather(x);
            }
            pass.compute(nullptr);
            pass.scatter();
            submit(pass.graph());
            ggml_backend_synchronize(gpu_.get()); // the slots may be given to others
            ++engine_->stats_.syncs;
            ++engine_->stats_.passes;
            step.computed(some);
        }
    }
}

} // namespace pye
