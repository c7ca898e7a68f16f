// One model's experts: the index, the slots of every shape class, the disk tier, counters. The expert FFN asks it for
// residency; nothing here knows graphs.
#pragma once

#include "bundle.h"
#include "event_ring.h"
#include "expert_index.h"
#include "expert_source.h"
#include "host_share.h"
#include "link.h"
#include "prefetcher.h"
#include "pyengine.h"
#include "ram_fill.h"
#include "ram_tier.h"
#include "recording.h"
#include "replay.h"
#include "slot_arena.h"
#include "slot_store.h"
#include "timeline.h"

#include "ggml-backend-impl.h"

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace pye {

class Engine : public std::enable_shared_from_this<Engine> {
  public:
    explicit Engine(const std::string & path);
    ~Engine();

    void use_bundle(const std::string & path); // before start()
    // Likewise. `shares` and `n_gpu_layers`: see layer_split.h.
    void use_gpus(const std::vector<std::string> & names, const std::vector<float> & shares, int32_t n_gpu_layers);
    // Likewise: llama.cpp was told that its routers choose so many experts for each token, not what the file says.
    void use_experts(uint32_t n);
    void start(uint64_t budget, uint64_t ram_budget);
    void close(); // stops I/O; computing afterwards fails
    // Of slots: of all, shared by bytes, or on one GPU.
    static constexpr uint32_t kAll = UINT32_MAX;
    // Returns the budget that is in force: less than that one if the GPU turns out not to have so much memory.
    uint64_t set_budget(uint64_t budget, uint32_t gpu = kAll);
    void     limit_vram(uint32_t gpu, uint64_t bytes); // for tests: as if it had no more for slots
    void     set_ram_tier(uint64_t budget);            // of slots in RAM behind GPUs
    void     set_host_threads(int n);
    void     set_link_limit(uint64_t bytes_per_s) {
        link_.limit(bytes_per_s);
        back_.limit(bytes_per_s);
    }
    void   fill_ram(); // from now on, until all that fits is there; see RamFill
    void   set_priorities(const float * values, size_t n);
    void   inject_read_errors(uint64_t after, uint64_t n);
    void   set_replay(const int32_t * ids, size_t n_step, size_t n_used);
    void   set_predictors(std::vector<Predictor> predictors);
    void   set_prefetch_rules(const pye_prefetch_rules & rules);
    void   set_look_ahead(bool on);
    void   expect(uint32_t layer, const uint32_t * experts, size_t n, bool keep);
    void   set_recording(bool ids, bool inputs);
    size_t take_recording(uint16_t * ids, uint16_t * weights, uint16_t * inputs, size_t capacity);
    void   set_timeline(bool on);
    size_t take_timeline(pye_span * out, size_t capacity);
    size_t events(pye_event * out, size_t capacity);

    pye_info            info() const;
    pye_stats           stats() const;
    pye_gpu             gpu_state(uint32_t number) const;
    const ExpertIndex & index() const { return index_; }

    // Remember why computing failed; the first reason since the last take stays.
    void    fail(int32_t code, const std::string & why);
    int32_t take_failure(std::string * why);
    // Something that did not fail and yet should be known; the first since the last take stays.
    void        notice(const std::string & what);
    std::string take_notice();

    // Making a bundle of this model, before start().
    std::vector<uint8_t> tables(bool raw) const;
    void                 record(bool raw, uint32_t layer, uint32_t expert, uint8_t * out);

    // Experts' bytes as they are in the file, for readers that want a tensor as a whole. Throws Error.
    void read_tensor(const ExpertMatrix & m, uint64_t from, uint64_t size, void * to) const;

    ggml_backend_buffer_type * buffer_type() { return &buft_; }
    // The first of those where the slots are and the experts compute; nullptr: in RAM, on the CPU.
    ggml_backend_dev_t gpu() const { return gpus_.empty() ? nullptr : gpus_[0].device; }
    size_t             n_gpu() const { return gpus_.size(); }
    // What llama.cpp is given in its place.
    ggml_backend_dev_t proxy(size_t number) const { return gpus_[number].proxy; }
    // The one that computes this layer's experts; nullptr: none.
    ggml_backend_dev_t proxy_of(uint32_t layer) const {
        return gpus_.empty() ? nullptr : gpus_[index_.classes[index_.layers[layer].shape_class].gpu].proxy;
    }

  private:
    friend class LayerStep;
    friend class ExpertFfn;
    friend class GpuStream;

    struct Class {
        std::unique_ptr<SlotMemory> memory;
        SlotArena *                 arena = nullptr; // the same, if it is in RAM
        std::unique_ptr<SlotStore>  store;
    };

    struct Gpu {
        ggml_backend_dev_t device, proxy;
        uint64_t           ffns  = 0; // computed
        uint64_t           limit = UINT64_MAX;
    };

    // An expert FFN is being computed on a GPU.
    void count_ffn(uint32_t layer) {
        ++stats_.steps_layers;
        ++gpus_[index_.classes[index_.layers[layer].shape_class].gpu].ffns;
    }
    // The router of a layer has chosen: [n_tokens][n_used] ids, exchanged in a replay. Throws Error if one is no expert.
    void hear(uint32_t layer, std::vector<int32_t> * ids);
    // From what it saw: what later layers may need, and a row of the trace. `weights` [n_used] and the gate inputs, one for
    // each token, may be absent.
    void look_ahead(uint32_t layer, const std::vector<int32_t> & ids, const float * weights,
                    const std::vector<const float *> & gate_inputs, int64_t n_tokens);

    // Slots by class; throws Error(PYE_E_BUDGET). Classes of other GPUs stay as they are.
    std::vector<uint32_t>        slots_for(uint64_t budget, uint32_t gpu = kAll) const;
    bool                         is_on(uint32_t gpu, size_t shape_class) const;
    std::vector<uint32_t>        ram_slots_for(uint64_t budget) const;
    std::vector<uint32_t>        shared_out(uint64_t budget, std::vector<uint32_t> n, uint32_t gpu) const;
    void                         apply_budget(const std::vector<uint32_t> & n_slot);
    void                         take_vram(const std::vector<uint32_t> & n_slot); // throws Error(PYE_E_MEMORY)
    uint64_t                     bytes_of(const std::vector<uint32_t> & n_slot, uint32_t gpu) const;
    void                         wait_for_streams();
    uint32_t                     least_slots(const ShapeClass & c) const;
    uint64_t                     least_budget(uint32_t gpu = kAll) const;
    std::unique_lock<std::mutex> locked() const;       // throws Error in a forked child
    void                         check_fresh() const;  // throws Error if it was started or closed
    void                         check_usable() const; // under the lock; throws Error if not started or closed

    ExpertIndex                 index_;
    std::vector<Gpu>            gpus_;        // as llama.cpp is given them
    Link                        link_, back_; // to VRAM and from it
    std::vector<platform::File> files_;       // until start() gives them to the source
    std::unique_ptr<Bundle>     bundle_;      // likewise
    bool                        direct_ = true;
    ggml_backend_buffer_type    buft_   = {};

    mutable std::mutex            mutex_; // everything below; held for the whole of an expert FFN
    std::vector<Class>            classes_;
    std::unique_ptr<RamTier>      ram_;
    HostShare                     share_;
    std::unique_ptr<ExpertSource> source_;
    uint64_t                      generation_ = 0; // changes whenever slots lie elsewhere
    // GPU streams that may still be computing with our slots.
    std::vector<std::shared_ptr<ggml_backend>> streams_;
    std::unique_ptr<Prefetcher>                prefetcher_; // once started
    EventRing                                  events_;
    Replay                                     replay_;
    Recording                                  recording_;
    Timeline                                   timeline_;
    pye_stats                                  stats_     = {};
    bool                                       closed_    = false;
    bool                                       surprised_ = false; // by how many experts routers choose
    std::unique_ptr<RamFill>                   fill_;
    int64_t                                    owner_ = 0; // process that opened us

    std::array<std::unique_ptr<BundlePacker>, 2> packers_; // raw or not

    std::mutex  failure_mutex_;
    int32_t     failure_code_ = PYE_OK;
    std::string failure_, notice_;
};

} // namespace pye
