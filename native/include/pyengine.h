/*
 * pyengine: runs mixture-of-experts GGUF models whose experts do not fit in memory, inside unmodified llama.cpp.
 *
 * Only a few experts work on each token. llama.cpp keeps what it is good at (graphs, tokenizer, sampler, attention,
 * kernels); this library owns *where experts live and when they move*. It is an ordinary ggml back-end device:
 *
 *   1. pye_open() indexes the expert tensors of a GGUF file (metadata only).
 *   2. llama.cpp loads the model with a tensor_buft_override that sends `_exps.weight` tensors to pye_buffer_type().
 *      That buffer type reserves addresses and stores nothing, so loading reads no expert byte.
 *   3. When a graph reaches an expert FFN, the scheduler hands it to our device. We read the selected expert ids, make
 *      those experts resident in slots, and let the stock ggml CPU kernels compute on the slots.
 *
 * With GPUs (pye_use_gpus) slots lie in its memory and the GPU's own ggml kernels compute on them: llama.cpp gets our proxy of
 * the device, which forwards everything else. RAM is then a tier of its own between disk and VRAM.
 *
 * Vocabulary. An *expert* is (layer, id): its gate, up and down weights together. A *slot* holds one expert or none.
 * Experts whose tensors have the same types and sizes form a *shape class*; a class has one arena of equal slots, shared
 * by all its layers. The *budget* is the bytes of slots. A *pin* keeps an expert in its slot until the kernels that read
 * it have finished. A *demand load* must succeed; a *prefetch* may fail quietly. A *pass* is one run of the kernels over
 * the (token, rank) pairs whose experts are resident. A *step* is one graph evaluation (llama_decode's micro-batch).
 *
 * Invariants, on which every caller may lean:
 *   1. a slot holds one expert or none; it is READY only after every byte has landed;
 *   2. a pinned slot is never evicted, and the pin lasts until the kernels have finished;
 *   3. residency changes time, never meaning: the same logits whatever the budget, the priorities or the disk's speed;
 *   4. priorities are advice: random or NaN values keep 3 true;
 *   5. a failed demand load makes llama_decode fail with a message in pye_take_failure(), never a wrong token;
 *   6. this library never calls back into its user.
 *
 * Threads: every function may be called from any thread, except pye_close(), which must be the last call. A process that
 * forks must not use an engine opened before the fork: computing with it fails with a clear message.
 */
#ifndef PYENGINE_H
#define PYENGINE_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define PYE_API __declspec(dllexport)
#else
#define PYE_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Everything between the two marks is plain C that cffi reads as it stands; keep preprocessor lines out of it. */
/* cffi: begin */

typedef struct pye_engine pye_engine;

/* What a call answers: PYE_OK or the kind of failure; pye_last_error() has the sentence. */
enum {
    PYE_OK            = 0,
    PYE_E_ARGUMENT    = -1, /* the caller's mistake */
    PYE_E_FILE        = -2, /* a file cannot be opened or read */
    PYE_E_FORMAT      = -3, /* not GGUF, truncated, or its numbers contradict each other */
    PYE_E_UNSUPPORTED = -4, /* valid, but this engine does not manage it: use stock llama.cpp */
    PYE_E_BUDGET      = -5, /* the budget is below pye_info.least_budget */
    PYE_E_MEMORY      = -6, /* the system refused memory */
    PYE_E_STATE       = -7, /* called at the wrong moment */
    PYE_E_STALE       = -8  /* a bundle that does not belong to this model, this ggml or this CPU */
};

/* What pye_open() learned from the file. All sizes in bytes. */
typedef struct {
    char     architecture[64];  /* GGUF key general.architecture */
    char     kernels[64];       /* CPU layouts in use, e.g. "q4_0 repacked" */
    int32_t  n_layer;           /* layers that have experts */
    int32_t  n_expert;          /* most experts in one layer, GGUF key <arch>.expert_count */
    int32_t  n_expert_used;     /* experts per token, GGUF key <arch>.expert_used_count */
    int32_t  n_embd;            /* width of gate inputs, what routers and experts read */
    int32_t  n_class;           /* shape classes */
    int32_t  n_file;            /* files of a split model, 1 otherwise */
    int32_t  direct_io;         /* 1 if every file is read past the page cache */
    int32_t  bundle;            /* 1 if experts are read from a bundle */
    int32_t  bundle_repacked;   /* 1 if that needs no repacking */
    uint64_t n_experts_total;   /* experts in all layers together */
    uint64_t file_bytes;        /* size of all files */
    uint64_t expert_bytes;      /* of those, expert tensors */
    uint64_t slot_bytes;        /* slots for every expert: the budget that keeps all resident */
    uint64_t least_budget;      /* the smallest budget that works */
    uint64_t expert_used_bytes; /* expert bytes one token reads, all layers */
} pye_info;

/* Counters since pye_start(). An access is one distinct expert of one layer in one step. */
typedef struct {
    uint64_t hits;   /* accesses whose expert was resident */
    uint64_t misses; /* accesses that waited for a demand load */
    uint64_t evictions;
    uint64_t bytes_read; /* bytes asked of the disk, alignment included */
    uint64_t reads;      /* read operations */
    uint64_t read_errors;
    uint64_t steps_layers;      /* expert FFNs computed */
    uint64_t passes;            /* kernel passes; equals steps_layers while nothing is missing */
    uint64_t prefetches;        /* begun */
    uint64_t prefetch_hits;     /* of the hits: accesses for which a prefetch was in time, its first use */
    uint64_t prefetches_late;   /* of the misses: their prefetch was under way */
    uint64_t prefetches_wasted; /* given up, or evicted before any use */
    uint64_t prefetches_failed; /* the disk failed; nobody needs to care */
    uint64_t guesses;           /* absent experts that a predictor named and a router then judged */
    uint64_t guesses_right;
    uint64_t predict_ns;     /* time in predictors, and in beginning their prefetches */
    uint64_t stall_ns;       /* time the kernels waited for loads */
    uint64_t compute_ns;     /* time inside the stock kernels */
    uint64_t load_ns;        /* time inside loads, summed over I/O threads */
    uint64_t io_ns;          /* time with at least one load under way */
    uint64_t resident;       /* experts resident now */
    uint64_t resident_bytes; /* bytes of their slots */
    uint64_t slots;          /* slots the present budget gives */
    uint64_t budget_bytes;   /* bytes of these slots */
    uint64_t events_lost;    /* events overwritten before pye_events() took them */
    /* With a GPU; slots are in VRAM then. Otherwise 0. */
    uint64_t link_bytes;     /* moved from host memory to VRAM */
    uint64_t link_ns;        /* time in these moves, summed over threads */
    uint64_t syncs;          /* times that the processor waited for the GPU */
    uint64_t begun_ahead;    /* pieces of graphs begun before it was known whether their experts are there */
    uint64_t computed_again; /* of those: one was not */
    uint64_t ram_hits;       /* loads whose expert was in RAM */
    uint64_t ram_resident;
    uint64_t ram_slots;
    uint64_t ram_budget_bytes;
    uint64_t link_bytes_per_s; /* measured of late, while anything moved */
    uint64_t host_pairs;       /* (token, rank) pairs whose missing expert the CPU computed from RAM */
    uint64_t host_ns;          /* time in that */
    uint64_t ram_demotions;    /* experts that left VRAM and were copied back to RAM */
    uint64_t ram_fills;        /* experts read into RAM ahead of need */
    uint64_t back_bytes;       /* moved from VRAM to RAM */
    uint64_t back_ns;          /* time in these moves, summed over threads */
} pye_stats;

/* ---- the bundle: experts on disk the way they are read
 *
 * A file beside the model. Every expert is one *record*: its matrices as they lie in a slot, so that a miss is one direct read
 * into the slot. Little endian; offsets and sizes in bytes, from the start of the file unless said otherwise:
 *
 *   0             pye_bundle_header
 *   header_bytes  pye_bundle_source [n_source]
 *   then          pye_bundle_layer  [n_variant][n_layer]
 *   then          pye_bundle_place  [n_variant][n_record]
 *   data_offset   records, each at a multiple of 4096, in any order
 *
 * Every checksum and signature is XXH3 (64 bits) with seed 0. A reader refuses a bundle unless all of the fingerprint agrees: format
 * version, ggml version, architecture, every source, and for each layer every field of its matrices. A *variant* is a full set
 * of records in one precision; variant 0 is the model's own. This version of the library writes one and reads the first. */

enum { PYE_BUNDLE_VERSION = 1 };

typedef struct {
    char     magic[8];       /* "pyebndl" and a zero */
    uint32_t format_version; /* PYE_BUNDLE_VERSION */
    uint32_t header_bytes;   /* sizeof(pye_bundle_header) */
    uint64_t checksum;       /* of the bytes from the end of this field to data_offset */
    uint64_t data_offset;    /* multiple of 4096 */
    uint64_t file_bytes;     /* of the whole bundle when complete */
    uint64_t n_done;         /* records written so far, in order of their offsets; complete when n_variant * n_record */
    uint32_t n_source;       /* files of the model */
    uint32_t n_variant;      /* at least 1 */
    uint32_t n_layer;        /* layers that have experts */
    uint32_t n_record;       /* experts in all layers together */
    char     ggml_version[32]; /* its layouts may change with it */
    char     architecture[64]; /* GGUF key general.architecture */
    char     order[64];        /* what the order of the records follows; information only */
    char     reserved[32];     /* zero */
} pye_bundle_header;

/* A file of the model. */
typedef struct {
    uint64_t bytes;
    int64_t  mtime_ns; /* of its last change, since 1970 */
    uint64_t
        digest; /* of its metadata (all before the tensor data) and the first 4096 bytes of each expert tensor in it */
} pye_bundle_source;

/* One matrix of an expert, in every record of the layer. */
typedef struct {
    char     role[16];  /* "gate", "up", "down" or "gate_up" */
    uint32_t type;      /* ggml_type */
    uint32_t repacked;  /* 1 if in the CPU kernels' layout, 0 if as in the GGUF file */
    uint64_t ne0;       /* input width, elements */
    uint64_t ne1;       /* output width, rows */
    uint64_t offset;    /* in the record */
    uint64_t bytes;     /* of the matrix */
    uint64_t signature; /* of the layout: what repacking makes of a known pattern; 0 if not repacked */
} pye_bundle_matrix;

typedef struct {
    uint32_t          block; /* N of blk.N */
    uint32_t          n_expert;
    uint32_t          n_matrix;     /* 2 or 3 */
    uint32_t          first;        /* number of the record of its expert 0 within the variant */
    uint64_t          record_bytes; /* multiple of 4096 */
    pye_bundle_matrix matrix[3];    /* zero beyond n_matrix */
} pye_bundle_layer;

/* Where a record lies. */
typedef struct {
    uint64_t offset;   /* multiple of 4096 */
    uint64_t checksum; /* of record_bytes bytes; 0 while the record is not written */
} pye_bundle_place;

/* What happened to one expert, in order. */
enum { PYE_EVENT_HIT = 0, PYE_EVENT_MISS = 1, PYE_EVENT_EVICT = 2, PYE_EVENT_PREFETCH = 3 };
typedef struct {
    uint32_t step;   /* counts expert FFNs, as pye_stats.steps_layers */
    uint16_t layer;  /* index among layers that have experts */
    uint16_t expert; /* id within the layer */
    uint16_t kind;   /* PYE_EVENT_* */
    uint16_t tokens; /* (token, rank) pairs that chose the expert; 0 for an eviction, a prefetch */
} pye_event;

/* What is prefetched. */
typedef struct {
    float least_chance; /* a guess is prefetched if guesses of its rank came true at least so often of late, 0..1 */
    /* While ids are replayed: with this probability a later layer's experts are guessed right, in the predictors' place;
     * below 0: no guesses. */
    float   replay_recall;
    int32_t replay_distance; /* so many layers ahead, at least 1 */
    int32_t preempt; /* 0, for ablations: reads in one queue, in order and whole; wrong prefetches are not given up */
    int32_t reorder; /* 0, for ablations: no expert of a layer computes before all of them have come */
} pye_prefetch_rules;

/* A stretch of time, for pictures. */
enum {
    PYE_SPAN_COMPUTE  = 0, /* the kernels of one pass */
    PYE_SPAN_STALL    = 1, /* the kernels wait for loads */
    PYE_SPAN_DEMAND   = 2, /* a load that somebody waits for, from its first read to its end */
    PYE_SPAN_PREFETCH = 3, /* a load that nobody waits for */
    PYE_SPAN_PREDICT  = 4,
    PYE_SPAN_FFN      = 5 /* a layer's experts, from the router's ids to the output; its passes and waiting lie in it */
};
typedef struct {
    uint64_t begin_ns; /* since pye_set_timeline() */
    uint64_t end_ns;
    uint16_t kind;   /* PYE_SPAN_* */
    uint16_t layer;  /* index among layers that have experts */
    uint16_t expert; /* of a load; else 0xffff */
    uint16_t flags;  /* of a load: 1: given up or failed; 2: a prefetch for which somebody came to wait */
} pye_span;

/* A predictor of one layer's experts from the gate input x [n_in] of an earlier one: scores = w2 h + b2, where h is x, or
 * with n_hidden > 0 relu(w1 x + b1). Row-major: w1 [n_hidden][n_in], w2 [n_expert][n_hidden or n_in]. */
typedef struct {
    uint32_t      source; /* index among layers that have experts, as target */
    uint32_t      target;
    uint32_t      n_in; /* pye_info.n_embd */
    uint32_t      n_hidden;
    uint32_t      n_expert; /* of the target layer */
    uint32_t      take;     /* of the highest scores, so many are guesses */
    const float * w1;
    const float * b1;
    const float * w2;
    const float * b2;
    const float *
        chances; /* [n_expert]: how often the expert of this rank is needed if it is absent; NULL if never measured */
} pye_predictor;

/* The sentence that belongs to this thread's last failed call. Never NULL. */
PYE_API const char * pye_last_error(void);

/* The llama-cpp-python and ggml versions this library was built for, e.g. "0.3.36 ggml 0.25.3". Loading it beside any
 * other version is refused by the Python package before the first call. */
PYE_API const char * pye_built_for(void);

/* Index the experts of a GGUF model (for a split model: its first file). Reads metadata, no tensor data. Fails with
 * PYE_E_UNSUPPORTED when the model has no experts or stores them in a way this engine does not manage. */
PYE_API int32_t pye_open(const char * path, pye_engine ** out);

/* The header and tables of a bundle of this model, of this ggml and CPU: records in file order, nothing done yet, checksums
 * zero. `raw` keeps every matrix as it is in the GGUF file, for other CPUs. Fills up to `capacity` bytes of `out` and sets
 * `*needed` (pye_bundle_header.data_offset). Reads a few pages of every file. */
PYE_API int32_t pye_bundle_tables(pye_engine * engine, int32_t raw, void * out, uint64_t capacity, uint64_t * needed);

/* The record of one expert: pye_bundle_layer.record_bytes bytes. Reads the model's file. `layer` counts layers that have
 * experts. Not at the same time from several threads. */
PYE_API int32_t pye_bundle_record(pye_engine * engine, int32_t raw, uint32_t layer, uint32_t expert, void * out);

/* XXH3, 64 bits, seed 0. */
PYE_API uint64_t pye_checksum(const void * bytes, uint64_t n);

/* Before pye_start(): read misses from this bundle. Fails with PYE_E_STALE if its fingerprint is not that of this model, ggml
 * and CPU, with PYE_E_FORMAT if it is damaged or incomplete; the engine then works without. */
PYE_API int32_t pye_use_bundle(pye_engine * engine, const char * path);

/* Something the user should know that did not fail: a sentence once, else empty. E.g. a damaged record of a bundle, whose
 * expert is read from the model's file instead. */
PYE_API void pye_take_notice(pye_engine * engine, char * sentence, size_t capacity);

/* For benchmarks of movement with random weights: from the next step on, expert ids come from here and not from the router;
 * [n_step][n_layer][n_used], row-major, begun anew after the last. A step with several tokens takes as many rows. n_step = 0
 * gives the router back its say. On a GPU, layers that lie in VRAM as a whole keep their router's ids, for nobody reads them. */
PYE_API int32_t pye_set_replay(pye_engine * engine, const int32_t * ids, size_t n_step, size_t n_used);

PYE_API int32_t pye_get_info(const pye_engine * engine, pye_info * out);

/* Reserve slots for `ram_budget` bytes and start the I/O threads. Slots above all experts' need are not made. */
PYE_API int32_t pye_start(pye_engine * engine, uint64_t ram_budget);

/* A device that llama.cpp was built for and found here. */
typedef struct {
    char     name[64];         /* e.g. "CUDA0" */
    char     description[128]; /* e.g. "NVIDIA H100" */
    char     device_id[64];    /* of the hardware, whichever back-end drives it, e.g. its PCI address; empty: unknown */
    uint64_t free_bytes;       /* of its memory, now */
    uint64_t total_bytes;
    int32_t  gpu;     /* 1: computes in memory of its own or the machine's, apart from the CPU */
    int32_t  unified; /* 1: that memory is the machine's RAM */
} pye_device;

/* The device of this number; PYE_E_ARGUMENT beyond the last. */
PYE_API int32_t pye_get_device(uint32_t number, pye_device * out);

/* The one of this name, as it is now; PYE_E_ARGUMENT if there is none. Others are not asked: some take memory to answer. */
PYE_API int32_t pye_find_device(const char * name, pye_device * out);

/* Before pye_start() and pye_use_bundle(): llama.cpp was told that routers choose so many experts for each token, not as many as
 * the file says. PYE_E_ARGUMENT: a layer has fewer. */
PYE_API int32_t pye_use_experts(pye_engine * engine, uint32_t n_expert_used);

/* Once, before pye_start_on_gpu(): keep slots on, and compute experts with, the n ggml devices of these names, e.g. "CUDA0". Each
 * has the layers that llama.cpp gives it with split mode "layer", `shares` as llama_model_params.tensor_split (not all zero) and
 * `n_gpu_layers`: both must be the same there, or activations travel between devices for nothing. No GPU twice; the CPU may be,
 * and plays several GPUs in tests. */
PYE_API int32_t pye_use_gpus(pye_engine * engine, const char * const * names, const float * shares, size_t n,
                             int32_t n_gpu_layers);

/* The ggml_backend_dev_t for llama_model_params.devices in the place of that device: forwards to it all that does not concern
 * our expert tensors. NULL if it is not in use. Never freed. */
PYE_API void * pye_gpu_device(pye_engine * engine, uint32_t number);

/* One of the GPUs in use. */
typedef struct {
    char     name[64];
    uint32_t n_layer;      /* with experts on it */
    uint64_t slot_bytes;   /* slots for all experts of these */
    uint64_t least_budget; /* the smallest that works */
    uint64_t budget_bytes;
    uint64_t slots;
    uint64_t resident; /* experts in them */
    uint64_t ffns;     /* computed since pye_start_on_gpu(); pye_stats.steps_layers is their sum */
} pye_gpu;

PYE_API int32_t pye_get_gpu(const pye_engine * engine, uint32_t number, pye_gpu * out);

/* pye_start() with slots in VRAM, `vram_budget` bytes of them, shared in proportion of each GPU's experts, and behind them `ram_budget` bytes of RAM (0: none) for experts
 * in file layout. Fails with PYE_E_MEMORY if either has not so much left. */
PYE_API int32_t pye_start_on_gpu(pye_engine * engine, uint64_t vram_budget, uint64_t ram_budget);

/* Change that of one GPU, or below zero of all, also while another thread decodes: it waits for the step in progress. All its
 * slots are made anew, empty. If there turns out to be less memory, less is taken; `*in_force` is the budget that is in force then,
 * else `vram_budget`. PYE_E_MEMORY: not even the least was there; there are no slots, and computing fails until a call succeeds. */
PYE_API int32_t pye_set_vram_budget(pye_engine * engine, int32_t gpu, uint64_t vram_budget, uint64_t * in_force);

/* For tests: as if this GPU had no more than so many bytes for slots, from the next budget on. */
PYE_API int32_t pye_limit_vram(pye_engine * engine, uint32_t gpu, uint64_t bytes);

/* With a GPU: read experts into empty slots in RAM, those of highest priority first, while the disk has nothing else to do.
 * Returns at once. */
PYE_API int32_t pye_fill_ram(pye_engine * engine);

/* For benchmarks: no more than so many bytes per second from host memory to VRAM, nor back; 0: what the machine gives. */
PYE_API int32_t pye_set_link_limit(pye_engine * engine, uint64_t bytes_per_s);

/* With a GPU: of experts that a step misses in VRAM and finds in RAM, some are computed by `n` threads of the CPU while others
 * are moved, where measured costs say that it is faster. 0, as at first: all are moved. Rows then round as the CPU's kernels
 * do, and which ones is a matter of time. */
PYE_API int32_t pye_set_host_threads(pye_engine * engine, int32_t n);

/* The ggml_backend_buffer_type_t to name in llama_model_params.tensor_buft_overrides for `_exps\.weight$`. */
PYE_API void * pye_buffer_type(pye_engine * engine);

/* Change the budget of slots in RAM, also while another thread decodes: it waits for the FFN in progress, evicts by priority,
 * then age, and gives the memory back to the system. With a GPU all slots in RAM are made anew, empty, and filled again as
 * after pye_fill_ram(), if that was called; after PYE_E_MEMORY there are as many as before, or if that fails too none. */
PYE_API int32_t pye_set_ram_budget(pye_engine * engine, uint64_t ram_budget);

/* One float per expert, [n_layer][n_expert] row-major, n values. The victim is the lowest priority, ties by oldest use:
 * all zero is LRU, +inf outlives everything finite. NaN counts as zero. */
PYE_API int32_t pye_set_priorities(pye_engine * engine, const float * priorities, size_t n);

/* What native guesses with from now on, copied; n = 0: nothing. */
PYE_API int32_t pye_set_predictors(pye_engine * engine, const pye_predictor * predictors, size_t n);

PYE_API int32_t pye_set_prefetch_rules(pye_engine * engine, const pye_prefetch_rules * rules);

/* Whether anything is guessed at all; 1 at first. What is expected with `keep` is fetched in any case. */
PYE_API int32_t pye_set_look_ahead(pye_engine * engine, int32_t on);

/* Prefetch experts of a layer that somebody expects, likeliest first: in the layer's next step, under the rules that hold for
 * guesses of predictors; or with `keep` at some time, as far as there are empty slots. */
PYE_API int32_t pye_expect(pye_engine * engine, uint32_t layer, const uint32_t * experts, size_t n, int32_t keep);

/* Record what routers see and choose, for tokens computed one at a time. */
PYE_API int32_t pye_set_recording(pye_engine * engine, int32_t ids, int32_t inputs);

/* Take up to `capacity` oldest tokens, none while one is being computed; returns how many. ids [token][n_layer][n_expert_used],
 * most probable first where the router sorts them; weights (their routing weights, 0 if unknown) likewise and inputs
 * [token][n_layer][n_embd] as IEEE half floats. Any may be NULL. Zero in layers that the model did not compute. */
PYE_API size_t pye_take_recording(pye_engine * engine, uint16_t * ids, uint16_t * weights, uint16_t * inputs,
                                  size_t capacity);

/* Note when what happens, the last 65,536 stretches. Turning it on forgets earlier ones. */
PYE_API int32_t pye_set_timeline(pye_engine * engine, int32_t on);

/* Take up to `capacity` oldest; returns how many. In order of their ends as far as they are of one thread. */
PYE_API size_t pye_take_timeline(pye_engine * engine, pye_span * out, size_t capacity);

PYE_API int32_t pye_get_stats(const pye_engine * engine, pye_stats * out);

/* Take up to `capacity` oldest events; returns how many. */
PYE_API size_t pye_events(pye_engine * engine, pye_event * out, size_t capacity);

/* If computing has failed since the last call, copy the reason and return its PYE_E_* code, else return PYE_OK. */
PYE_API int32_t pye_take_failure(pye_engine * engine, char * reason, size_t capacity);

/* For tests: the next `n` demand loads after `after` successful ones, and the prefetches among them, fail as if the disk
 * had. n = 0 switches it off. */
PYE_API int32_t pye_inject_read_errors(pye_engine * engine, uint64_t after, uint64_t n);

/* Release the engine. Tensors of a model that is still loaded keep what they need alive, but can no longer compute. */
PYE_API void pye_close(pye_engine * engine);

/* cffi: end */

#ifdef __cplusplus
}
#endif

#endif
