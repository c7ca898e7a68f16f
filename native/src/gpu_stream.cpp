#include "gpu_stream.h"

#include "error.h"

#include "ggml-impl.h"

#include <algorithm>
#include <new>
#include <optional>

namespace pye {

namespace {

// A piece is begun ahead if all experts were there at least so often; the mean of about ten tokens.
constexpr float kAhead = 0.5f, kFading = 0.9f;

// With so many (token, rank) pairs for each expert of a layer, nearly all experts are needed.
constexpr size_t kPairsForAll = 4;

// Predictors run on the processor: for more tokens than these they would take longer than what they save.
constexpr int64_t kMostTokensForeseen = 8;

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

bool GpuStream::needs_all(const FfnChain & chain) {
    return static_cast<size_t>(chain.n_used() * chain.n_tokens()) >= kPairsForAll * chain.layer().n_expert;
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

} // namespace pye
