// Computes llama.cpp's graphs on a GPU, with experts in slots. One object per llama_context.
//
// The graph runs in pieces on the GPU's own stream, with slots in the place of expert tensors. A piece ends before the experts
// of a layer of which not all are in VRAM: the router's ids are read back, missing experts are loaded, and slot numbers take
// the ids' place. Layers that are in VRAM as a whole need none of it: their slots lie in the order of their experts, so the
// ids are right as they are and the piece goes on. A model in VRAM as a whole is one piece, as in stock llama.cpp.
//
// For one token the GPU need not wait for us either, where a layer's experts are there more often than not: a table on the
// device turns ids into slots, the next piece is begun at once, and the ids are looked at meanwhile. If one was missing after
// all, what the piece has overwritten is put back and the piece is computed again.
#pragma once

#include "device_room.h"
#include "ffn_graph.h"
#include "host_ffn.h"
#include "layer_step.h"
#include "row_groups.h"
#include "scratch.h"

#include "ggml-backend-impl.h"

#include <array>
#include <memory>
#include <vector>

namespace pye {

class GpuStream {
  public:
    explicit GpuStream(ggml_backend_t gpu);

    GpuStream(const GpuStream &)             = delete;
    GpuStream & operator=(const GpuStream &) = delete;

    ggml_backend_t inner() const { return gpu_.get(); }
    void           set_abort_callback(ggml_abort_callback callback, void * data);
    ggml_status    compute(ggml_cgraph * graph);

  private:
    struct Aborted {};
    // Nodes [begin, end) that are computed together, and by which name the GPU's back-end knows them.
    struct Piece {
        int      begin, end;
        uint64_t uid;
    };
    // A graph of our own beside llama.cpp's.
    struct Aside {
        ggml_cgraph * graph = nullptr;
        uint64_t      uid   = 0;
    };
    // An expert FFN of the graph.
    struct Ffn {
        bool          whole; // its layer lies in VRAM in the order of its experts
        ggml_tensor * slots; // in the place of the router's ids, unless whole
        char *        ids;   // copied from the router, in host_
        // Likewise the FFN's inputs, of which the first is the router's too; nullptr: nobody asks for it.
        std::array<char *, FfnChain::kMostInputs> inputs;
        bool                                      on_host; // the CPU may compute some of its experts
        bool                                      asked;   // for inputs, this time
        char *                                    numbers; // of slots, to be copied to `slots`

        // Of one token whose layer is not whole.
        ggml_tensor * table;      // by expert: its slot, any if it has none
        char *        table_here; // as it was last copied there
        bool          table_sent;
        char *        guessed; // as `numbers`, in a replay
        Aside         back;    // puts back what the piece has overwritten; none: the piece cannot be repeated
        Aside         tell;    // keeps, before the layer, what its router says and sees:
        char *        told_at; // inputs that are wanted and ids, one behind the other, where nothing overwrites them
        // The piece with what must go before: it saves what it will overwrite, and turns ids into slots. Behind it the next
        // layer's nodes of `tell`.
        std::vector<ggml_tensor *> ahead;
        uint64_t                   ahead_uid;
    };
    struct Patched {
        ggml_tensor *node, *weight, *ids;
    };

    void look_at(ggml_cgraph * graph);
    void run(ggml_cgraph * graph);
    void run_token(ggml_cgraph * graph);
    void run_tokens(ggml_cgraph * graph);
    void choose_form(ggml_cgraph * graph);
    int  end_of_piece(ggml_cgraph * graph, size_t k) const;
    bool is_whole(const FfnChain & chain) const;
    bool foresees(const FfnChain & chain) const;
    // Of a layer's experts, nearly all.
    static bool needs_all(const FfnChain & chain);
    bool        may_compute_on_host(const FfnChain & chain) const;
    void        lay_out(ggml_cgraph * graph);
    void        patch(ggml_cgraph * graph, size_t i);
    void        compute_nodes(ggml_cgraph * graph, int begin, int end);
    void        submit(ggml_cgraph * graph);
    void        ask_router(size_t i);
    void        ask_told(size_t k); // k: place in partly_
    bool        wants_its_inputs(size_t i) const;
    void        hear_router(size_t i);
    void        prepare_repeats(ggml_cgraph * graph);
    void        begin_ahead(ggml_cgraph * graph, size_t i);
    bool        much_is_missing(uint32_t layer) const;
    bool        was_right(const FfnChain & chain, const LayerStep & step) const;
    void        submit(const Aside & aside);
    void        wait_for(size_t k);
    void        put_slots(size_t i, const LayerStep & step);
    void        share_out(size_t i, std::vector<Wanted> * missing);
    void        compute_on_host(ggml_cgraph * graph, size_t i);
    uint32_t    time_on_host(ggml_cgraph * graph, size_t i, std::vector<uint32_t> & experts);
    void        send_rows(ggml_cgraph * graph, size_t i);
    bool        is_on_host(uint32_t expert) const;
    void        look_ahead(size_t i);
    void        compute_in_passes(ggml_cgraph * graph, const FfnChain & chain, LayerStep & step);

    std::shared_ptr<ggml_backend> gpu_; // shared with engines, which may have to wait for it
    ggml_abort_callback           abort_      = nullptr;
    void *                        abort_data_ = nullptr;
    Engine *                      engine_     = nullptr; // of the graph being computed; its lock is held

    std::vector<FfnChain> chains_;
    uint64_t              chains_uid_ = 0;     // of the graph that they are of
    bool                  ends_early_ = false; // there is an FFN without tokens, which is none of them
    std::vector<Ffn>      ffns_;               // by chain
    std::vector<size_t>   partly_;             // chains whose layers are not whole
    bool                  alone_;              // one token
    // The same graph, computed in the same form, has the same pieces and tensors: the GPU's back-end need not look again.
    std::vector<Piece>         pieces_;
    std::vector<uint64_t>      form_;
    std::vector<char>          memory_; // of tensors_
    ContextPtr                 tensors_;
    std::vector<ggml_tensor *> weights_;      // slots in the place of expert tensors, in the order of the chains' nodes
    std::vector<size_t>        first_weight_; // by chain
    std::vector<Patched>       patched_;
    std::vector<char>          aside_memory_; // of asides_
    ContextPtr                 asides_;

    // What has been begun ahead: the slots of its layer's experts then, and when that was.
    std::vector<uint32_t> at_begin_;
    uint64_t              begun_ = 0;
    std::vector<float>    here_; // by layer: how often all experts of a token were there, of late

    struct EventFree {
        void operator()(ggml_backend_event * e) const { ggml_backend_event_free(e); }
    };
    using Event = std::unique_ptr<ggml_backend_event, EventFree>;
    // By turns. A piece has been computed; what its router says has been copied. nullptr: the device has no events.
    Event events_[2], copied_[2];
    // A stream of its own for copies to the host, which the next piece need not wait for.
    struct BackendFree {
        void operator()(ggml_backend_t b) const { ggml_backend_free(b); }
    };
    std::unique_ptr<ggml_backend, BackendFree> copies_;
    bool                                       unsettled_ = false; // copies may be under way

    HostRoom         host_;
    DeviceRoom       slots_;
    DeviceRoom       inputs_; // copies for passes
    DeviceRoom       saved_;
    DeviceRoom       told_;
    DevicePassMemory pass_;
    HostRoom         rows_; // what the CPU has computed, on its way to the GPU

    std::vector<int32_t>       ids_; // [n_tokens][n_used], experts of the layer being computed
    RowGroups                  groups_;
    std::vector<Wanted>        wanted_;
    std::vector<const float *> gate_inputs_; // [n_tokens]
    std::vector<uint32_t>      on_host_;     // experts of the layer being computed: pinned in RAM, for the CPU
    std::vector<uint32_t>      tried_;       // likewise, to see how long the CPU takes; it is moved all the same
    HostFfn                    host_ffn_;
    std::vector<char>          pass_tensors_;
};

} // namespace pye
