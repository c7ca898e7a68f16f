// The public functions: the only catch-all, and the only place where errors become codes and sentences.
#include "backend.h"
#include "checksum.h"
#include "engine.h"
#include "error.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

struct pye_engine {
    std::shared_ptr<pye::Engine> engine;
};

namespace {

thread_local std::string g_last_error;

int32_t failed(int32_t code, const std::string & sentence) {
    g_last_error = sentence;
    return code;
}

void copy_text(const std::string & text, char * to, size_t capacity) {
    if (capacity > 0) {
        strncpy(to, text.c_str(), capacity - 1);
        to[capacity - 1] = '\0';
    }
}

template <class F> int32_t guarded(F && body) {
    try {
        body();
        return PYE_OK;
    } catch (const pye::Error & e) {
        return failed(e.code(), e.what());
    } catch (const std::bad_alloc &) {
        return failed(PYE_E_MEMORY, "out of memory");
    } catch (const std::exception & e) {
        return failed(PYE_E_STATE, std::string("internal error: ") + e.what());
    }
}

enum class Tier { Ram, Vram };

// Where the slots of this engine are.
void expect_tier(const pye_engine * e, Tier tier) {
    if ((e->engine->gpu() != nullptr) != (tier == Tier::Vram)) {
        throw pye::Error(PYE_E_STATE, tier == Tier::Vram ? "no GPU was chosen: slots are in RAM"
                                                         : "a GPU was chosen: slots are in VRAM");
    }
}

void describe(ggml_backend_dev_t dev, pye_device * out) {
    const auto             type  = ggml_backend_dev_type(dev);
    ggml_backend_dev_props props = {};
    ggml_backend_dev_get_props(dev, &props);
    *out = {};
    copy_text(ggml_backend_dev_name(dev), out->name, sizeof out->name);
    copy_text(ggml_backend_dev_description(dev), out->description, sizeof out->description);
    copy_text(props.device_id != nullptr ? props.device_id : "", out->device_id, sizeof out->device_id);
    out->free_bytes  = props.memory_free;
    out->total_bytes = props.memory_total;
    out->unified     = type == GGML_BACKEND_DEVICE_TYPE_IGPU;
    out->gpu         = type == GGML_BACKEND_DEVICE_TYPE_GPU || out->unified;
}

} // namespace

const char * pye_last_error(void) { return g_last_error.c_str(); }
const char * pye_built_for(void) { return PYE_LLAMA_CPP_PYTHON_VERSION " ggml " PYE_GGML_VERSION; }

int32_t pye_open(const char * path, pye_engine ** out) {
    if (path == nullptr || out == nullptr) {
        return failed(PYE_E_ARGUMENT, "pye_open needs a path and a place for the engine");
    }
    return guarded([&] {
        auto engine = std::make_shared<pye::Engine>(path);
        pye::register_device();
        *out = new pye_engine{std::move(engine)};
    });
}

int32_t pye_bundle_tables(pye_engine * e, int32_t raw, void * out, uint64_t capacity, uint64_t * needed) {
    return guarded([&] {
        const auto bytes = e->engine->tables(raw != 0);
        memcpy(out, bytes.data(), std::min<uint64_t>(capacity, bytes.size()));
        *needed = bytes.size();
    });
}

int32_t pye_bundle_record(pye_engine * e, int32_t raw, uint32_t layer, uint32_t expert, void * out) {
    return guarded([&] { e->engine->record(raw != 0, layer, expert, static_cast<uint8_t *>(out)); });
}

uint64_t pye_checksum(const void * bytes, uint64_t n) { return pye::checksum(bytes, n); }

int32_t pye_use_bundle(pye_engine * e, const char * path) {
    return guarded([&] { e->engine->use_bundle(path); });
}

void pye_take_notice(pye_engine * e, char * sentence, size_t capacity) {
    (void)guarded([&] { copy_text(e->engine->take_notice(), sentence, capacity); });
}

int32_t pye_set_replay(pye_engine * e, const int32_t * ids, size_t n_step, size_t n_used) {
    return guarded([&] { e->engine->set_replay(ids, n_step, n_used); });
}

int32_t pye_get_info(const pye_engine * e, pye_info * out) {
    return guarded([&] { *out = e->engine->info(); });
}

int32_t pye_start(pye_engine * e, uint64_t ram_budget) {
    return guarded([&] {
        expect_tier(e, Tier::Ram);
        e->engine->start(ram_budget, 0);
    });
}

int32_t pye_get_device(uint32_t number, pye_device * out) {
    return guarded([&] {
        if (number >= ggml_backend_dev_count()) {
            throw pye::Error(PYE_E_ARGUMENT, "there is no such device");
        }
        describe(ggml_backend_dev_get(number), out);
    });
}

int32_t pye_find_device(const char * name, pye_device * out) {
    return guarded([&] {
        ggml_backend_dev_t dev = ggml_backend_dev_by_name(name);
        if (dev == nullptr) {
            throw pye::Error(PYE_E_ARGUMENT, std::string("this llama.cpp has no device ") + name);
        }
        describe(dev, out);
    });
}

int32_t pye_use_experts(pye_engine * e, uint32_t n_expert_used) {
    return guarded([&] { e->engine->use_experts(n_expert_used); });
}

int32_t pye_use_gpus(pye_engine * e, const char * const * names, const float * shares, size_t n, int32_t n_gpu_layers) {
    return guarded([&] {
        e->engine->use_gpus(std::vector<std::string>(names, names + n), std::vector<float>(shares, shares + n),
                            n_gpu_layers);
    });
}

void * pye_gpu_device(pye_engine * e, uint32_t number) {
    return number < e->engine->n_gpu() ? e->engine->proxy(number) : nullptr;
}

int32_t pye_get_gpu(const pye_engine * e, uint32_t number, pye_gpu * out) {
    return guarded([&] { *out = e->engine->gpu_state(number); });
}

int32_t pye_start_on_gpu(pye_engine * e, uint64_t vram_budget, uint64_t ram_budget) {
    return guarded([&] {
        expect_tier(e, Tier::Vram);
        e->engine->start(vram_budget, ram_budget);
    });
}

int32_t pye_set_vram_budget(pye_engine * e, int32_t gpu, uint64_t vram_budget, uint64_t * in_force) {
    return guarded([&] {
        expect_tier(e, Tier::Vram);
        if (gpu >= 0 && static_cast<size_t>(gpu) >= e->engine->n_gpu()) {
            throw pye::Error(PYE_E_ARGUMENT, "no GPU " + std::to_string(gpu) + " is in use");
        }
        *in_force = e->engine->set_budget(vram_budget, gpu < 0 ? pye::Engine::kAll : static_cast<uint32_t>(gpu));
    });
}

int32_t pye_limit_vram(pye_engine * e, uint32_t gpu, uint64_t bytes) {
    return guarded([&] {
        if (gpu >= e->engine->n_gpu()) {
            throw pye::Error(PYE_E_ARGUMENT, "no GPU " + std::to_string(gpu) + " is in use");
        }
        e->engine->limit_vram(gpu, bytes);
    });
}

int32_t pye_fill_ram(pye_engine * e) {
    return guarded([&] {
        expect_tier(e, Tier::Vram);
        e->engine->fill_ram();
    });
}

int32_t pye_set_link_limit(pye_engine * e, uint64_t bytes_per_s) {
    return guarded([&] { e->engine->set_link_limit(bytes_per_s); });
}

int32_t pye_set_host_threads(pye_engine * e, int32_t n) {
    return guarded([&] {
        expect_tier(e, Tier::Vram);
        e->engine->set_host_threads(n);
    });
}

void * pye_buffer_type(pye_engine * e) { return e->engine->buffer_type(); }

int32_t pye_set_ram_budget(pye_engine * e, uint64_t ram_budget) {
    return guarded([&] {
        if (e->engine->n_gpu() > 0) {
            e->engine->set_ram_tier(ram_budget);
        } else {
            e->engine->set_budget(ram_budget);
        }
    });
}

int32_t pye_set_priorities(pye_engine * e, const float * priorities, size_t n) {
    return guarded([&] { e->engine->set_priorities(priorities, n); });
}

int32_t pye_set_predictors(pye_engine * e, const pye_predictor * given, size_t n) {
    return guarded([&] {
        std::vector<pye::Predictor> predictors(n);
        for (size_t i = 0; i < n; ++i) {
            const pye_predictor & from = given[i];
            pye::Predictor &      to   = predictors[i];
            if (from.w2 == nullptr || from.b2 == nullptr ||
                (from.n_hidden > 0 && (from.w1 == nullptr || from.b1 == nullptr))) {
                throw pye::Error(PYE_E_ARGUMENT, "a predictor lacks a matrix");
            }
            to.source       = from.source;
            to.target       = from.target;
            to.n_in         = from.n_in;
            to.n_hidden     = from.n_hidden;
            to.n_expert     = from.n_expert;
            to.take         = from.take;
            const size_t in = from.n_hidden > 0 ? from.n_hidden : from.n_in;
            if (from.n_hidden > 0) {
                to.w1.assign(from.w1, from.w1 + size_t(from.n_hidden) * from.n_in);
                to.b1.assign(from.b1, from.b1 + from.n_hidden);
            }
            to.w2.assign(from.w2, from.w2 + in * from.n_expert);
            to.b2.assign(from.b2, from.b2 + from.n_expert);
            if (from.chances != nullptr) {
                to.chances.assign(from.chances, from.chances + from.n_expert);
            }
        }
        e->engine->set_predictors(std::move(predictors));
    });
}

int32_t pye_set_prefetch_rules(pye_engine * e, const pye_prefetch_rules * rules) {
    return guarded([&] { e->engine->set_prefetch_rules(*rules); });
}

int32_t pye_set_look_ahead(pye_engine * e, int32_t on) {
    return guarded([&] { e->engine->set_look_ahead(on != 0); });
}

int32_t pye_expect(pye_engine * e, uint32_t layer, const uint32_t * experts, size_t n, int32_t keep) {
    return guarded([&] { e->engine->expect(layer, experts, n, keep != 0); });
}

int32_t pye_set_recording(pye_engine * e, int32_t ids, int32_t inputs) {
    return guarded([&] { e->engine->set_recording(ids != 0, inputs != 0); });
}

size_t pye_take_recording(pye_engine * e, uint16_t * ids, uint16_t * weights, uint16_t * inputs, size_t capacity) {
    size_t n = 0;
    (void)guarded([&] { n = e->engine->take_recording(ids, weights, inputs, capacity); }); // none in a forked child
    return n;
}

int32_t pye_set_timeline(pye_engine * e, int32_t on) {
    return guarded([&] { e->engine->set_timeline(on != 0); });
}

size_t pye_take_timeline(pye_engine * e, pye_span * out, size_t capacity) {
    size_t n = 0;
    (void)guarded([&] { n = e->engine->take_timeline(out, capacity); }); // none in a forked child
    return n;
}

int32_t pye_get_stats(const pye_engine * e, pye_stats * out) {
    return guarded([&] { *out = e->engine->stats(); });
}

size_t pye_events(pye_engine * e, pye_event * out, size_t capacity) {
    size_t n = 0;
    (void)guarded([&] { n = e->engine->events(out, capacity); }); // none in a forked child
    return n;
}

int32_t pye_take_failure(pye_engine * e, char * reason, size_t capacity) {
    std::string   why;
    const int32_t code = e->engine->take_failure(&why);
    copy_text(why, reason, capacity);
    return code;
}

int32_t pye_inject_read_errors(pye_engine * e, uint64_t after, uint64_t n) {
    return guarded([&] { e->engine->inject_read_errors(after, n); });
}

void pye_close(pye_engine * e) {
    if (e != nullptr) {
        e->engine->close();
        delete e;
    }
}
