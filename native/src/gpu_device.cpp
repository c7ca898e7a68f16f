#include "gpu_device.h"

#include "buffer.h"
#include "engine.h"
#include "ffn_graph.h"
#include "gpu_stream.h"

#include <cstring>
#include <deque>
#include <mutex>
#include <string>

namespace pye {

namespace {

struct Proxy {
    ggml_backend_dev_t  gpu;
    uint32_t            number;
    std::string         name, description;
    ggml_backend_reg    registry;
    ggml_backend_device device;
    // Of all but the first of several proxies of one device: it says that nobody else reaches what lies there.
    ggml_backend_buffer_type apart;
};

Proxy & self(ggml_backend_dev_t dev) { return *static_cast<Proxy *>(dev->context); }

// --- stream: forwards all but computing ---------------------------------------------------------------------------

GpuStream &    stream(ggml_backend_t b) { return *static_cast<GpuStream *>(b->context); }
ggml_backend_t inner(ggml_backend_t b) { return stream(b).inner(); }
bool           is_ours(ggml_backend_t b);

const char * stream_name(ggml_backend_t b) { return ggml_backend_name(inner(b)); }
void         stream_free(ggml_backend_t b) {
    delete &stream(b);
    delete b;
}
void set_tensor_async(ggml_backend_t b, ggml_tensor * t, const void * data, size_t offset, size_t size) {
    ggml_backend_tensor_set_async(inner(b), t, data, offset, size);
}
void get_tensor_async(ggml_backend_t b, const ggml_tensor * t, void * data, size_t offset, size_t size) {
    ggml_backend_tensor_get_async(inner(b), t, data, offset, size);
}
bool cpy_tensor_async(ggml_backend_t from, ggml_backend_t to, const ggml_tensor * src, ggml_tensor * dst) {
    from = is_ours(from) ? inner(from) : from;
    to   = is_ours(to) ? inner(to) : to;
    return to->iface.cpy_tensor_async != nullptr && to->iface.cpy_tensor_async(from, to, src, dst);
}
void        synchronize(ggml_backend_t b) { ggml_backend_synchronize(inner(b)); }
ggml_status graph_compute(ggml_backend_t b, ggml_cgraph * graph) { return stream(b).compute(graph); }
void        event_record(ggml_backend_t b, ggml_backend_event_t event) { ggml_backend_event_record(event, inner(b)); }
void        event_wait(ggml_backend_t b, ggml_backend_event_t event) { ggml_backend_event_wait(inner(b), event); }
void        graph_optimize(ggml_backend_t b, ggml_cgraph * graph, ggml_backend_graph_optimize_params * params) {
    if (inner(b)->iface.graph_optimize != nullptr) {
        inner(b)->iface.graph_optimize(inner(b), graph, params);
    }
}

bool is_ours(ggml_backend_t b) { return b->iface.graph_compute == graph_compute; }

// --- device -------------------------------------------------------------------------------------------------------

const char * device_name(ggml_backend_dev_t dev) { return self(dev).name.c_str(); }
const char * device_description(ggml_backend_dev_t dev) { return self(dev).description.c_str(); }
void         device_memory(ggml_backend_dev_t dev, size_t * free, size_t * total) {
    ggml_backend_dev_memory(self(dev).gpu, free, total);
}

// Also of what is no GPU (tests wrap the CPU): layers go to devices of this type.
enum ggml_backend_dev_type device_type(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; }

void device_props(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    ggml_backend_dev_get_props(self(dev).gpu, props);
    props->name        = device_name(dev);
    props->description = device_description(dev);
    props->type        = device_type(dev);
}

ggml_backend_t device_init(ggml_backend_dev_t dev, const char * params) {
    ggml_backend_t gpu = ggml_backend_dev_init(self(dev).gpu, params);
    if (gpu == nullptr) {
        return nullptr;
    }
    static ggml_guid guid  = {0x3d, 0x91, 0x0c, 0x5e, 0x44, 0xb8, 0x49, 0x7a,
                              0x9f, 0x16, 0xe2, 0x60, 0x0b, 0xd5, 0x28, 0xc4};
    ggml_backend_i   iface = {};
    iface.get_name         = stream_name;
    iface.free             = stream_free;
    iface.set_tensor_async = set_tensor_async;
    iface.get_tensor_async = get_tensor_async;
    iface.synchronize      = synchronize;
    iface.graph_compute    = graph_compute;
    iface.graph_optimize   = graph_optimize;
    // The scheduler takes what is absent as what the device cannot do.
    iface.cpy_tensor_async = gpu->iface.cpy_tensor_async != nullptr ? cpy_tensor_async : nullptr;
    iface.event_record     = gpu->iface.event_record != nullptr ? event_record : nullptr;
    iface.event_wait       = gpu->iface.event_wait != nullptr ? event_wait : nullptr;
    return new ggml_backend{&guid, iface, dev, new GpuStream(gpu)};
}

ggml_backend_buffer_type_t device_buffer_type(ggml_backend_dev_t dev) {
    Proxy & p = self(dev);
    return p.number == 0 ? ggml_backend_dev_buffer_type(p.gpu) : &p.apart;
}
const char * apart_name(ggml_backend_buffer_type_t buft) { return static_cast<Proxy *>(buft->context)->name.c_str(); }
bool         apart_is_host(ggml_backend_buffer_type_t) { return false; }
ggml_backend_buffer_type_t device_host_buffer_type(ggml_backend_dev_t dev) {
    return ggml_backend_dev_host_buffer_type(self(dev).gpu);
}
ggml_backend_buffer_t buffer_from_host_ptr(ggml_backend_dev_t dev, void * ptr, size_t size, size_t max_tensor_size) {
    return ggml_backend_dev_buffer_from_host_ptr(self(dev).gpu, ptr, size, max_tensor_size);
}

// Whether this GPU computes the experts of that tensor's layer.
bool is_of(ggml_backend_dev_t dev, const ggml_tensor * weight) {
    const Binding * binding = binding_of(weight);
    return binding->engine->proxy_of(binding->layer) == dev;
}

// Whether a multiplication by an expert tensor can be computed from slots of this GPU.
bool multiplies_from_slots(ggml_backend_dev_t dev, const ggml_tensor * op) {
    if (!is_of(dev, op->src[0])) {
        return false;
    }
    ggml_backend_dev_t  gpu = self(dev).gpu;
    const ggml_tensor * w   = op->src[0];
    return multiplies_from(gpu, ggml_backend_dev_buffer_type(gpu), w->type, w->ne[0], w->ne[1],
                           static_cast<uint32_t>(w->ne[2]), static_cast<uint32_t>(op->src[2]->ne[0]));
}

bool device_supports_op(ggml_backend_dev_t dev, const ggml_tensor * op) {
    if (is_expert_matmul(op)) {
        return multiplies_from_slots(dev, op);
    }
    if (op->op == GGML_OP_NONE && binding_of(op) != nullptr) {
        return is_of(dev, op);
    }
    for (const ggml_tensor * source : op->src) {
        if (source != nullptr && binding_of(source) != nullptr) {
            return false; // whatever else is done with an expert tensor
        }
    }
    return ggml_backend_dev_supports_op(self(dev).gpu, op);
}

bool device_supports_buft(ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft) {
    const Proxy & p = self(dev);
    return is_expert_buffer_type(buft) ||
           (p.number == 0 ? ggml_backend_dev_supports_buft(p.gpu, buft) : buft == &p.apart);
}

bool device_offload_op(ggml_backend_dev_t dev, const ggml_tensor * op) {
    return ggml_backend_dev_offload_op(self(dev).gpu, op);
}
ggml_backend_event_t event_new(ggml_backend_dev_t dev) { return ggml_backend_event_new(self(dev).gpu); }
void                 event_free(ggml_backend_dev_t, ggml_backend_event_t event) { ggml_backend_event_free(event); }
void event_synchronize(ggml_backend_dev_t, ggml_backend_event_t event) { ggml_backend_event_synchronize(event); }

// --- registry: of one device, known to nobody but llama.cpp's models that were given the device ---------------------

const char *       registry_name(ggml_backend_reg_t) { return "pyengine"; }
size_t             registry_count(ggml_backend_reg_t) { return 1; }
ggml_backend_dev_t registry_device(ggml_backend_reg_t reg, size_t) {
    return &static_cast<Proxy *>(reg->context)->device;
}

void * proc_of(ggml_backend_t b, const char * name) {
    return ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(ggml_backend_get_device(b)), name);
}
// Of the CPU, in tests; a GPU has neither.
void set_n_threads(ggml_backend_t b, int n) {
    if (auto set = reinterpret_cast<ggml_backend_set_n_threads_t>(proc_of(inner(b), "ggml_backend_set_n_threads"))) {
        set(inner(b), n);
    }
}
void set_abort_callback(ggml_backend_t b, ggml_abort_callback callback, void * data) {
    auto set =
        reinterpret_cast<ggml_backend_set_abort_callback_t>(proc_of(inner(b), "ggml_backend_set_abort_callback"));
    if (set != nullptr) {
        set(inner(b), callback, data);
    }
    stream(b).set_abort_callback(callback, data);
}

void * registry_proc(ggml_backend_reg_t, const char * name) {
    if (strcmp(name, "ggml_backend_set_n_threads") == 0) {
        return reinterpret_cast<void *>(set_n_threads);
    }
    if (strcmp(name, "ggml_backend_set_abort_callback") == 0) {
        return reinterpret_cast<void *>(set_abort_callback);
    }
    return nullptr;
}

void fill(Proxy & p, ggml_backend_dev_t gpu, uint32_t number) {
    p.gpu         = gpu;
    p.number      = number;
    p.name        = std::string("pyengine over ") + ggml_backend_dev_name(gpu) +
                    (number == 0 ? "" : " (" + std::to_string(number + 1) + ")");
    p.description = ggml_backend_dev_description(gpu);
    p.registry    = {GGML_BACKEND_API_VERSION, {registry_name, registry_count, registry_device, registry_proc}, &p};

    ggml_backend_device_i & i = p.device.iface;
    i.get_name                = device_name;
    i.get_description         = device_description;
    i.get_memory              = device_memory;
    i.get_type                = device_type;
    i.get_props               = device_props;
    i.init_backend            = device_init;
    i.get_buffer_type         = device_buffer_type;
    i.get_host_buffer_type    = gpu->iface.get_host_buffer_type != nullptr ? device_host_buffer_type : nullptr;
    i.buffer_from_host_ptr    = gpu->iface.buffer_from_host_ptr != nullptr ? buffer_from_host_ptr : nullptr;
    i.supports_op             = device_supports_op;
    i.supports_buft           = device_supports_buft;
    i.offload_op              = gpu->iface.offload_op != nullptr ? device_offload_op : nullptr;
    i.event_new               = gpu->iface.event_new != nullptr ? event_new : nullptr;
    i.event_free              = gpu->iface.event_free != nullptr ? event_free : nullptr;
    i.event_synchronize       = gpu->iface.event_synchronize != nullptr ? event_synchronize : nullptr;
    p.device.reg              = &p.registry;
    p.device.context          = &p;
    if (number > 0) {
        p.apart                = *ggml_backend_dev_buffer_type(gpu);
        p.apart.iface.get_name = apart_name; // llama.cpp tells them apart by it
        p.apart.iface.is_host  = apart_is_host;
        p.apart.device         = &p.device;
        p.apart.context        = &p;
        i.buffer_from_host_ptr = nullptr;
    }
}

} // namespace

ggml_backend_dev_t gpu_proxy(ggml_backend_dev_t gpu, uint32_t number) {
    static std::mutex           mutex;
    static std::deque<Proxy> &  proxies = *new std::deque<Proxy>;
    std::lock_guard<std::mutex> lock(mutex);
    for (Proxy & p : proxies) {
        if (p.gpu == gpu && p.number == number) {
            return &p.device;
        }
    }
    proxies.emplace_back();
    fill(proxies.back(), gpu, number);
    return &proxies.back().device;
}

} // namespace pye
