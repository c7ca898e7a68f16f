// What passes between the routers on the GPU and the host: ids and inputs to here, slot numbers to there.
#include "gpu_stream.h"

#include "ggml-impl.h"

#include <algorithm>

namespace pye {

namespace {

// Where all experts are there this often, nobody needs to foresee any: it costs more than the few that are missing.
constexpr float kNothingToForesee = 0.95f;

} // namespace

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
    read_ids(chain, ffns_[i].ids, &ids_);
    engine_->hear(chain.binding->layer, &ids_);
    groups_.assign(ids_, n_expert);
    list_wanted(groups_, n_expert, &wanted_);
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

} // namespace pye
