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
    PYE_E_STATE       = -7  /* called at the wrong moment */
};

/* What pye_open() learned from the file. All sizes in bytes. */
typedef struct {
    char     architecture[64];  /* GGUF key general.architecture */
    char     kernels[64];       /* CPU layouts in use, e.g. "q4_0 repacked" */
    int32_t  n_layer;           /* layers that have experts */
    int32_t  n_expert;          /* most experts in one layer, GGUF key <arch>.expert_count */
    int32_t  n_expert_used;     /* experts per token, GGUF key <arch>.expert_used_count */
    int32_t  n_class;           /* shape classes */
    int32_t  n_file;            /* files of a split model, 1 otherwise */
    int32_t  direct_io;         /* 1 if every file is read past the page cache */
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
    uint64_t steps_layers;   /* expert FFNs computed */
    uint64_t passes;         /* kernel passes; equals steps_layers while nothing is missing */
    uint64_t stall_ns;       /* time the kernels waited for loads */
    uint64_t compute_ns;     /* time inside the stock kernels */
    uint64_t load_ns;        /* time inside loads, summed over I/O threads */
    uint64_t resident;       /* experts resident now */
    uint64_t resident_bytes; /* bytes of their slots */
    uint64_t slots;          /* slots the present budget gives */
    uint64_t budget_bytes;   /* bytes of these slots */
    uint64_t events_lost;    /* events overwritten before pye_events() took them */
} pye_stats;

/* What happened to one expert, in order. */
enum { PYE_EVENT_HIT = 0, PYE_EVENT_MISS = 1, PYE_EVENT_EVICT = 2 };
typedef struct {
    uint32_t step;   /* counts expert FFNs, as pye_stats.steps_layers */
    uint16_t layer;  /* index among layers that have experts */
    uint16_t expert; /* id within the layer */
    uint16_t kind;   /* PYE_EVENT_* */
    uint16_t tokens; /* (token, rank) pairs that chose the expert; 0 for an eviction */
} pye_event;

/* The sentence that belongs to this thread's last failed call. Never NULL. */
PYE_API const char * pye_last_error(void);

/* The llama-cpp-python and ggml versions this library was built for, e.g. "0.3.36 ggml 0.25.3". Loading it beside any
 * other version is refused by the Python package before the first call. */
PYE_API const char * pye_built_for(void);

/* Index the experts of a GGUF model (for a split model: its first file). Reads metadata, no tensor data. Fails with
 * PYE_E_UNSUPPORTED when the model has no experts or stores them in a way this engine does not manage. */
PYE_API int32_t pye_open(const char * path, pye_engine ** out);

PYE_API int32_t pye_get_info(const pye_engine * engine, pye_info * out);

/* Reserve slots for `ram_budget` bytes and start the I/O threads. Slots above all experts' need are not made. */
PYE_API int32_t pye_start(pye_engine * engine, uint64_t ram_budget);

/* The ggml_backend_buffer_type_t to name in llama_model_params.tensor_buft_overrides for `_exps\.weight$`. */
PYE_API void * pye_buffer_type(pye_engine * engine);

/* Change the budget, also while another thread decodes: it waits for the FFN in progress, evicts by priority, then age,
 * and gives the memory back to the system. */
PYE_API int32_t pye_set_ram_budget(pye_engine * engine, uint64_t ram_budget);

/* One float per expert, [n_layer][n_expert] row-major, n values. The victim is the lowest priority, ties by oldest use:
 * all zero is LRU, +inf outlives everything finite. NaN counts as zero. */
PYE_API int32_t pye_set_priorities(pye_engine * engine, const float * priorities, size_t n);

PYE_API int32_t pye_get_stats(const pye_engine * engine, pye_stats * out);

/* Take up to `capacity` oldest events; returns how many. */
PYE_API size_t pye_events(pye_engine * engine, pye_event * out, size_t capacity);

/* If computing has failed since the last call, copy the reason and return its PYE_E_* code, else return PYE_OK. */
PYE_API int32_t pye_take_failure(pye_engine * engine, char * reason, size_t capacity);

/* For tests: the next `n` demand loads after `after` successful ones fail as if the disk had. n = 0 switches it off. */
PYE_API int32_t pye_inject_read_errors(pye_engine * engine, uint64_t after, uint64_t n);

/* Release the engine. Tensors of a model that is still loaded keep what they need alive, but can no longer compute. */
PYE_API void pye_close(pye_engine * engine);

/* cffi: end */

#ifdef __cplusplus
}
#endif

#endif
