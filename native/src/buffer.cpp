#include "buffer.h"

#include "backend.h"
#include "error.h"

#include "ggml.h"

#include <deque>
#include <memory>

namespace pye {

namespace {

struct ExpertBuffer {
    std::shared_ptr<Engine> engine; // the buffer type lives in the engine, and tensors may outlive pye_close()
    void *                  addresses;
    std::deque<Binding>     bindings;
};

ExpertBuffer * self(ggml_backend_buffer_t b) { return static_cast<ExpertBuffer *>(b->context); }

void free_buffer(ggml_backend_buffer_t b) {
    platform::unmap(self(b)->addresses, b->size);
    delete self(b);
}

void * get_base(ggml_backend_buffer_t b) { return self(b)->addresses; }

// Renames the tensor: llama.cpp's loader then finds no data under its name and reads nothing.
ggml_status init_tensor(ggml_backend_buffer_t b, ggml_tensor * t) {
    ExpertBuffer *       buffer = self(b);
    const ExpertMatrix * m      = buffer->engine->index().find(t->name);
    if (m == nullptr || m->type != t->type || m->ne0 != t->ne[0] || m->ne1 != t->ne[1] ||
        buffer->engine->index().layers[m->layer].n_expert != t->ne[2]) {
        buffer->engine->fail(PYE_E_UNSUPPORTED,
                             std::string("tensor ") + t->name + " is not an expert weight of this model");
        return GGML_STATUS_FAILED;
    }
    buffer->bindings.push_back({buffer->engine.get(), m->layer, m->place});
    t->extra = &buffer->bindings.back();
    ggml_format_name(t, "@%s", m->name.c_str());
    return GGML_STATUS_SUCCESS;
}

void refuse_write(ggml_backend_buffer_t b, const ggml_tensor * t) {
    self(b)->engine->fail(PYE_E_UNSUPPORTED, std::string("writing to expert tensor ") + t->name + " is not supported");
}
void memset_tensor(ggml_backend_buffer_t b, ggml_tensor * t, uint8_t, size_t, size_t) { refuse_write(b, t); }
void set_tensor(ggml_backend_buffer_t b, ggml_tensor * t, const void *, size_t, size_t) { refuse_write(b, t); }

void get_tensor(ggml_backend_buffer_t b, const ggml_tensor * t, void * to, size_t offset, size_t size) {
    Engine *        engine  = self(b)->engine.get();
    const Binding * binding = binding_of(t);
    try {
        engine->read_tensor(engine->index().layers[binding->layer].matrices[binding->place], offset, size, to);
    } catch (const Error & e) {
        engine->fail(e.code(), e.what());
    }
}

void clear(ggml_backend_buffer_t, uint8_t) {}

const char * get_name(ggml_backend_buffer_type_t) { return "pyengine experts"; }

ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    void * addresses = platform::reserve_addresses(size);
    if (addresses == nullptr) {
        return nullptr;
    }
    ggml_backend_buffer_i iface = {};
    iface.free_buffer           = free_buffer;
    iface.get_base              = get_base;
    iface.init_tensor           = init_tensor;
    iface.memset_tensor         = memset_tensor;
    iface.set_tensor            = set_tensor;
    iface.get_tensor            = get_tensor;
    iface.clear                 = clear;
    auto engine                 = static_cast<Engine *>(buft->context)->shared_from_this();
    return ggml_backend_buffer_init(buft, iface, new ExpertBuffer{std::move(engine), addresses, {}}, size);
}

size_t get_alignment(ggml_backend_buffer_type_t) { return 64; }
bool   is_host(ggml_backend_buffer_type_t) { return false; }

} // namespace

ggml_backend_buffer_type expert_buffer_type(Engine * engine) {
    ggml_backend_buffer_type buft = {};
    buft.iface.get_name           = get_name;
    buft.iface.alloc_buffer       = alloc_buffer;
    buft.iface.get_alignment      = get_alignment;
    buft.iface.is_host            = is_host;
    buft.device                   = expert_device();
    buft.context                  = engine;
    return buft;
}

bool is_expert_buffer_type(ggml_backend_buffer_type_t buft) { return buft->iface.get_name == get_name; }

const Binding * binding_of(const ggml_tensor * t) {
    return t->buffer != nullptr && is_expert_buffer_type(t->buffer->buft) ? static_cast<const Binding *>(t->extra)
                                                                          : nullptr;
}

} // namespace pye
