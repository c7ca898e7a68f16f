// One model's experts: the index, the slots of every shape class, the disk tier, counters. The expert FFN asks it for
// residency; nothing here knows graphs.
#pragma once

#include "bundle.h"
#include "event_ring.h"
#include "expert_index.h"
#include "expert_source.h"
#include "prefetcher.h"
#include "pyengine.h"
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

    void   use_bundle(const std::string & path); // before start()
    void   start(uint64_t budget);
    void   close(); // stops I/O; computing afterwards fails
    void   set_ram_budget(uint64_t budget);
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

  private:
    friend class LayerStep;
    friend class ExpertFfn;

    struct Class {
        std::unique_ptr<SlotArena> arena;
        std::unique_ptr<SlotStore> store;
    };

    std::vector<uint32_t>        slots_for(uint64_t budget) const; // by class; throws Error(PYE_E_BUDGET)
    void                         apply_budget(uint64_t budget);
    uint64_t                     least_budget() const;
    std::unique_lock<std::mutex> locked() const;       // throws Error in a forked child
    void                         check_fresh() const;  // throws Error if it was started or closed
    void                         check_usable() const; // under the lock; throws Error if not started or closed

    ExpertIndex                 index_;
    std::vector<platform::File> files_;  // until start() gives them to the source
    std::unique_ptr<Bundle>     bundle_; // likewise
    bool                        direct_ = true;
    ggml_backend_buffer_type    buft_   = {};

    mutable std::mutex            mutex_; // everything below; held for the whole of an expert FFN
    std::vector<Class>            classes_;
    std::unique_ptr<ExpertSource> source_;
    std::unique_ptr<Prefetcher>   prefetcher_; // once started
    EventRing                     events_;
    Replay                        replay_;
    Recording                     recording_;
    Timeline                      timeline_;
    pye_stats                     stats_  = {};
    bool                          closed_ = false;
    int64_t                       owner_  = 0; // process that opened us

    std::array<std::unique_ptr<BundlePacker>, 2> packers_; // raw or not

    std::mutex  failure_mutex_;
    int32_t     failure_code_ = PYE_OK;
    std::string failure_, notice_;
};

} // namespace pye
