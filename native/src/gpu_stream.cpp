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

size_t ids_bytes(const FfnChain & chain) {
    return static_cast<size_t>(chain.n_used() * chain.n_tokens()) * sizeof(int32_t);
}

bool needs_all(const FfnChain & chain) {
    return static_cast<size_t>(chain.n_used() * chain.n_tokens()) >= kPairsForAll * chain.layer().n_expert;
}

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
    : gpu_(gpu, ggml_backend_free), host_(gpu), slots_(gpu), inputs_(gpu), saved_(gpu), pass_(gpu) {
    for (auto & event : events_) {
        event.reset(ggml_backend_event_new(ggml_backend_get_device(gpu)));
    }
}

void GpuStream::set_abort_callback(ggml_abort_callback callback, void * data) {
    abort_      = callback;
    abort_data_ = data;
}

ggml_status GpuStream::compute(ggml_cgraph * graph) {
    Engine * engine = nullptr;
    try {
        // It looks at every node's readers, of which whole graphs have many.
        if (graph->uid == 0 || graph->uid != chains_uid_) {
            chains_uid_ = 0;
            find_chains(graph, &chains_);
            chains_uid_ = graph->uid;
        }
        if (chains_.empty()) {
            return ggml_backend_graph_compute_async(gpu_.get(), graph);
        }
        engine          = chains_[0].binding->engine;
        const auto lock = engine->locked();
        engine->check_usable();
        engine_ = engine;
        run(graph);
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

void GpuStream::run(ggml_cgraph * graph) {
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
    const auto ask_next = [&](size_t k) {
        if (k + 1 < partly_.size()) {
            ask_router(partly_[k + 1]);
            record(k + 1);
        }
    };
    compute_nodes(graph, 0, chains_[partly_[0]].begin);
    ask_router(partly_[0]);
    record(0);
    for (size_t k = 0; k < partly_.size(); ++k) {
        const size_t     i     = partly_[k];
        const FfnChain & chain = chains_[i];
        float &          here  = here_[chain.binding->layer];
        const bool       ahead = here >= kAhead && ffns_[i].back.graph != nullptr;
        if (ahead) {
            begin_ahead(graph, i);
            ask_next(k);
            ++engine_->stats_.begun_ahead;
        }
        if (heard) {
            look_ahead(*heard);
        }
        wait_for(k);
        computing.reset();
        hear_router(i);
        heard = i;
        computing.emplace(*engine_, chain.binding->layer, wanted_);
        here = kFading * here + (computing->all_resident() ? 1.0f - kFading : 0.0f);
        ++engine_->stats_.passes;
        const bool right = ahead && was_right(chain, *computing);
        while (!computing->next().empty()) {
        }
        if (right) {
            continue;
        }
        if (ahead) {
            ++engine_->stats_.computed_again;
            submit(ffns_[i].back);
        }
        put_slots(i, *computing);
        compute_nodes(graph, chain.begin, end_of_piece(graph, k));
        ask_next(k);
    }
    look_ahead(*heard);
    ggml_backend_synchronize(gpu_.get());
    ++engine_->stats_.syncs;
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
        computing.emplace(*engine_, chain.binding->layer, wanted_);
        if (computing->wants_slots()) {
            compute_in_passes(graph, chain, *computing);
            computing.reset();
            done = chain.end;
            continue;
        }
        while (!computing->next().empty()) {
        }
        if (needs_all(chain)) {
            computing->pass_on();
        }
        put_slots(i, *computing);
        patch(graph, i);
        ++engine_->stats_.passes;
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
        form.push_back(static_cast<uint64_t>(chain.begin) << 2 | static_cast<uint64_t>(wants_inputs(chain)) << 1 |
                       static_cast<uint64_t>(ffns_[i].whole));
    }
    // Where several tokens meet some experts, each time other slots are spanned.
    if (graph->uid == 0 || (!partly_.empty() && !alone_) || form != form_) {
        pieces_.clear();
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

bool GpuStream::wants_inputs(const FfnChain & chain) const {
    return (alone_ && engine_->recording_.wants_inputs()) ||
           (chain.n_tokens() <= kMostTokensForeseen && !engine_->replay_.active() &&
            engine_->prefetcher_->listens(chain.binding->layer));
}

// Tensors and scratch memory for this graph.
void GpuStream::lay_out(ggml_cgraph * graph) {
    size_t n_weight = 0, host = 0, device = 0;
    for (const FfnChain & chain : chains_) {
        const size_t ids = ids_bytes(chain);
        n_weight += static_cast<size_t>(chain.end - chain.begin);
        const size_t table = alone_ ? Pieces::rounded(chain.layer().n_expert * sizeof(int32_t)) : 0;
        host += Pieces::rounded(ggml_nbytes(chain.ids)) + 2 * Pieces::rounded(ids) + table +
                (wants_inputs(chain) ? Pieces::rounded(ggml_nbytes(chain.inputs[0])) : 0);
        device += Pieces::rounded(ids) + table;
    }
    host_.reserve(host);
    slots_.reserve(device);
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
        ffn.inputs  = wants_inputs(chain) ? on_host.take(ggml_nbytes(chain.inputs[0])) : nullptr;

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

// For every piece that can be computed twice: the piece with nodes before it that save what it will overwrite and turn ids into
// slots, and a graph that puts it back.
void GpuStream::prepare_repeats(ggml_cgraph * graph) {
    std::vector<std::vector<MemoryRange>> ranges(partly_.size());
    size_t                                size = 0, n_tensor = 0;
    for (size_t k = 0; k < partly_.size(); ++k) {
        const int begin = chains_[partly_[k]].begin;
        const int end   = end_of_piece(graph, k);
        if (!can_be_repeated(graph, begin, end)) {
            continue;
        }
        ranges[k] = overwritten_inputs(graph, begin, end);
        for (const MemoryRange & r : ranges[k]) {
            size += Pieces::rounded(r.size);
        }
        n_tensor += 6 * ranges[k].size() + 4;
        ffns_[partly_[k]].back.uid = ggml_graph_next_uid(); // to be made
    }
    saved_.reserve(std::max<size_t>(size, 1));
    Pieces room(saved_.base());
    asides_.reset();
    const size_t graphs = partly_.size() * (ggml_graph_overhead_custom(kMostAside, false) + 64);
    aside_memory_.resize(std::max(aside_memory_.size(), n_tensor * ggml_tensor_overhead() + graphs));
    asides_            = ContextPtr(ggml_init({aside_memory_.size(), aside_memory_.data(), /*no_alloc=*/true}));
    ggml_context * ctx = asides_.get();
    const auto     raw = [ctx](char * at, size_t bytes, ggml_backend_buffer_t buffer) {
        ggml_tensor * t = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, static_cast<int64_t>(bytes / sizeof(int32_t)));
        t->data         = at;
        t->buffer       = buffer;
        return t;
    };
    const auto node = [](ggml_tensor * t, const ggml_tensor * at) {
        t->data   = at->data;
        t->buffer = at->buffer;
        t->flags |= GGML_TENSOR_FLAG_COMPUTE;
        return t;
    };
    for (size_t k = 0; k < partly_.size(); ++k) {
        const FfnChain & chain = chains_[partly_[k]];
        Ffn &            ffn   = ffns_[partly_[k]];
        if (ffn.back.uid == 0 || ranges[k].size() > kMostAside ||
            std::any_of(ranges[k].begin(), ranges[k].end(),
                        [](const MemoryRange & r) { return r.size % sizeof(int32_t) != 0; })) {
            continue;
        }
        ffn.back.graph = ggml_new_graph_custom(ctx, kMostAside, false);
        ffn.ahead.clear();
        for (const MemoryRange & r : ranges[k]) {
            ggml_tensor * theirs = raw(r.begin, r.size, r.buffer);
            ggml_tensor * ours   = raw(room.take(r.size), r.size, saved_.buffer());
            ffn.ahead.push_back(node(ggml_cpy(ctx, theirs, ours), ours));
            ggml_graph_add_node(ffn.back.graph, node(ggml_cpy(ctx, ours, theirs), theirs));
        }
        if (!engine_->replay_.active()) {
            ggml_tensor * ids = raw(static_cast<char *>(chain.ids->data), ids_bytes(chain), chain.ids->buffer);
            ffn.ahead.push_back(node(ggml_get_rows(ctx, ffn.table, ids), ffn.slots));
        }
        for (int n = chain.begin; n < end_of_piece(graph, k); ++n) {
            ffn.ahead.push_back(ggml_graph_node(graph, n));
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

void GpuStream::record(size_t k) {
    if (events_[k % 2]) {
        ggml_backend_event_record(events_[k % 2].get(), gpu_.get());
    }
}

void GpuStream::wait_for(size_t k) {
    if (events_[k % 2]) {
        ggml_backend_event_synchronize(events_[k % 2].get());
    } else {
        ggml_backend_synchronize(gpu_.get());
    }
    ++engine_->stats_.syncs;
}

// What the router has chosen, and seen, is copied as soon as it is there.
void GpuStream::ask_router(size_t i) {
    const FfnChain & chain = chains_[i];
    ggml_backend_tensor_get_async(gpu_.get(), chain.ids, ffns_[i].ids, 0, ggml_nbytes(chain.ids));
    ffns_[i].asked =
        ffns_[i].inputs != nullptr && (engine_->recording_.wants_inputs() || much_is_missing(chain.binding->layer + 1));
    if (ffns_[i].asked) {
        const ggml_tensor * x = chain.inputs[0];
        ggml_backend_tensor_get_async(gpu_.get(), x, ffns_[i].inputs, 0, ggml_nbytes(x));
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
// between the lowest and the highest.
void GpuStream::put_slots(size_t i, const LayerStep & step) {
    uint32_t lowest = 0, highest = 0;
    if (!alone_) {
        lowest = UINT32_MAX;
        for (const Wanted & w : wanted_) {
            lowest  = std::min(lowest, step.slot_of(w.expert));
            highest = std::max(highest, step.slot_of(w.expert));
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
    for (size_t k = 0; k < ids_.size(); ++k) {
        numbers[k] = static_cast<int32_t>(step.slot_of(static_cast<uint32_t>(ids_[k])) - lowest);
    }
    ggml_backend_tensor_set_async(gpu_.get(), ffns_[i].slots, numbers, 0, ids_.size() * sizeof(int32_t));
}

void GpuStream::look_ahead(size_t i) {
    const FfnChain & chain = chains_[i];
    gate_inputs_.clear();
    if (ffns_[i].asked) {
        for (int64_t t = 0; t < chain.n_tokens(); ++t) {
            gate_inputs_.push_back(
                reinterpret_cast<const float *>(ffns_[i].inputs + static_cast<size_t>(t) * chain.inputs[0]->nb[2]));
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
            PassGraph pass(chain, slots, step, groups_, some, Multiply::ByRow, pass_tensors_, pass_, graph, chain.end);
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
