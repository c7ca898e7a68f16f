#include "quiet_kernels.h"

#include "ggml.h"

#include <atomic>
#include <mutex>

namespace pye {

namespace {

// Whose turn it is after our filter.
struct Next {
    std::atomic<ggml_log_callback> log{nullptr};
    std::atomic<void *>            data{nullptr};
};

Next             g_next;
std::mutex       g_mutex;
thread_local int t_quiet = 0;

void filter(ggml_log_level level, const char * text, void *) {
    if (t_quiet == 0 || (level != GGML_LOG_LEVEL_DEBUG && level != GGML_LOG_LEVEL_CONT)) {
        g_next.log.load()(level, text, g_next.data.load());
    }
}

} // namespace

void filter_log() {
    const std::lock_guard<std::mutex> lock(g_mutex);
    ggml_log_callback                 log;
    void *                            data;
    ggml_log_get(&log, &data);
    if (log != filter) {
        g_next.data = data;
        g_next.log  = log;
        ggml_log_set(filter, nullptr);
    }
}

QuietKernels::QuietKernels() { ++t_quiet; }
QuietKernels::~QuietKernels() { --t_quiet; }

} // namespace pye
