// The public functions: the only catch-all, and the only place where errors become codes and sentences.
#include "backend.h"
#include "engine.h"
#include "error.h"

#include <cstring>
#include <memory>
#include <new>

struct pye_engine {
    std::shared_ptr<pye::Engine> engine;
};

namespace {

thread_local std::string g_last_error;

int32_t failed(int32_t code, const std::string & sentence) {
    g_last_error = sentence;
    return code;
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

int32_t pye_get_info(const pye_engine * e, pye_info * out) {
    return guarded([&] { *out = e->engine->info(); });
}

int32_t pye_start(pye_engine * e, uint64_t ram_budget) {
    return guarded([&] { e->engine->start(ram_budget); });
}

void * pye_buffer_type(pye_engine * e) { return e->engine->buffer_type(); }

int32_t pye_set_ram_budget(pye_engine * e, uint64_t ram_budget) {
    return guarded([&] { e->engine->set_ram_budget(ram_budget); });
}

int32_t pye_set_priorities(pye_engine * e, const float * priorities, size_t n) {
    return guarded([&] { e->engine->set_priorities(priorities, n); });
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
    if (capacity > 0) {
        strncpy(reason, why.c_str(), capacity - 1);
        reason[capacity - 1] = '\0';
    }
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
