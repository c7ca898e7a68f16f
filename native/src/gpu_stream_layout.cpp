// Which tensors and graphs go beside llama.cpp's, and where they lie.
#include "gpu_stream.h"

#include "error.h"
#include "rerun.h"

#include "ggml-impl.h"

#include <algorithm>
#include <numeric>

namespace pye {

namespace {

constexpr int kMostAside = 32; // nodes

size_t ids_bytes(const FfnChain & chain) {
    return static_cast<size_t>(chain.n_used() * chain.n_tokens()) * sizeof(int32_t);
}

} // namespace

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

} // namespace pye
