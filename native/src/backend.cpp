// ggml's vtables: registry, device, stream. No logic of residency; the expert FFN has it.
#include "backend.h"

#include "buffer.h"
#include "expert_ffn.h"
#include "ffn_graph.h"

#include "ggml-cpu.h"

#include <cstring>
#include <mutex>

namespace pye {

namespace {

constexpr const char * kName = "pyengine";

// --- stream: one per llama_context --------------------------------------------------------------------------------

ExpertFfn * self(ggml_backend_t b) { return static_cast<ExpertFfn *>(b->context); }

const char * stream_name(ggml_backend_t) { return kName; }
void         stream_free(ggml_backend_t b) {
    delete self(b);
    delete b;
}
ggml_status stream_compute(ggml_backend_t b, ggml_cgraph * graph) { return self(b)->compute(graph); }

void set_n_threads(ggml_backend_t b, int n) { self(b)->set_n_threads(n); }
void set_abort_callback(ggml_backend_t b, ggml_abort_callback callback, void * data) {
    self(b)->set_abort_callback(callback, data);
}

// --- device -------------------------------------------------------------------------------------------------------

const char * device_name(ggml_backend_dev_t) { return kName; }
const char * device_description(ggml_backend_dev_t) { return "experts in limited memory, on the stock CPU kernels"; }
void         device_memory(ggml_backend_dev_t, size_t * free, size_t * total) { *free = *total = 0; }

// ACCEL devices join every llama_context before the CPU, without being asked for and without taking layers.
enum ggml_backend_dev_type device_type(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_ACCEL; }

void device_props(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    *props             = {};
    props->name        = device_name(dev);
    props->description = device_description(dev);
    props->type        = device_type(dev);
}

ggml_backend_t device_init(ggml_backend_dev_t dev, const char *) {
    static ggml_guid guid  = {0x6e, 0x1f, 0x2b, 0x9a, 0x70, 0x55, 0x4c, 0x0d,
                              0x8e, 0x43, 0xb1, 0x27, 0xd9, 0x3c, 0x5a, 0x88};
    ggml_backend_i   iface = {};
    iface.get_name         = stream_name;
    iface.free             = stream_free;
    iface.graph_compute    = stream_compute;
    return new ggml_backend{&guid, iface, dev, new ExpertFfn};
}

// The outputs of our nodes lie in ordinary memory, beside everybody else's.
ggml_backend_buffer_type_t device_buffer_type(ggml_backend_dev_t) { return ggml_backend_cpu_buffer_type(); }

bool device_supports_op(ggml_backend_dev_t, const ggml_tensor * op) { return belongs_to_expert_ffn(op); }

bool device_supports_buft(ggml_backend_dev_t, ggml_backend_buffer_type_t buft) {
    return is_expert_buffer_type(buft) || ggml_backend_buft_is_host(buft);
}

// --- registry -----------------------------------------------------------------------------------------------------

const char *       registry_name(ggml_backend_reg_t) { return kName; }
size_t             registry_count(ggml_backend_reg_t) { return 1; }
ggml_backend_dev_t registry_device(ggml_backend_reg_t, size_t) { return expert_device(); }

void * registry_proc(ggml_backend_reg_t, const char * name) {
    if (strcmp(name, "ggml_backend_set_n_threads") == 0) {
        return reinterpret_cast<void *>(set_n_threads);
    }
    if (strcmp(name, "ggml_backend_set_abort_callback") == 0) {
        return reinterpret_cast<void *>(set_abort_callback);
    }
    return nullptr;
}

ggml_backend_reg g_registry = {
    GGML_BACKEND_API_VERSION, {registry_name, registry_count, registry_device, registry_proc}, nullptr};

ggml_backend_device make_device() {
    ggml_backend_device dev   = {};
    dev.iface.get_name        = device_name;
    dev.iface.get_description = device_description;
    dev.iface.get_memory      = device_memory;
    dev.iface.get_type        = device_type;
    dev.iface.get_props       = device_props;
    dev.iface.init_backend    = device_init;
    dev.iface.get_buffer_type = device_buffer_type;
    dev.iface.supports_op     = device_supports_op;
    dev.iface.supports_buft   = device_supports_buft;
    dev.reg                   = &g_registry;
    return dev;
}

} // namespace

ggml_backend_dev_t expert_device() {
    static ggml_backend_device dev = make_device();
    return &dev;
}

void register_device() {
    static std::once_flag once;
    std::call_once(once, [] { ggml_backend_register(&g_registry); });
}

} // namespace pye

// What ggml_backend_load() looks for in a library named by GGML_BACKEND_PATH.
extern "C" PYE_API ggml_backend_reg_t ggml_backend_init(void);
extern "C" ggml_backend_reg_t         ggml_backend_init(void) { return &pye::g_registry; }
