// Experts that the CPU computes where they lie in RAM, while others are moved.
#include "gpu_stream.h"

#include "elapsed.h"

#include <algorithm>
#include <chrono>

namespace pye {

namespace {

// The CPU's kernels take a row at a time: of more tokens than these, moving an expert is cheaper than its rows.
constexpr int64_t kMostTokensOnHost = 32;

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

} // namespace

bool GpuStream::may_compute_on_host(const FfnChain & chain) const {
    return engine_->share_.threads() > 0 && engine_->ram_->n_slot() > 0 && chain.n_tokens() <= kMostTokensOnHost &&
           !needs_all(chain) && std::all_of(chain.inputs, chain.inputs + chain.n_input, ggml_is_contiguous);
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

} // namespace pye
