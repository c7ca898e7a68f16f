#include "device_arena.h"

#include "error.h"
#include "scratch.h"

#include "ggml-backend-impl.h"

namespace pye {

namespace {

constexpr size_t kSlack = 4096; // some kernels read past the last row

} // namespace

DeviceArena::DeviceArena(ggml_backend_dev_t gpu, const ExpertLayer & layer, uint32_t n_slot, uint32_t n_expert_used) {
    ggml_backend_buffer_type_t buft = ggml_backend_dev_buffer_type(gpu);
    std::vector<char>          memory;
    for (const ExpertMatrix & m : layer.matrices) {
        if (!multiplies_from(gpu, buft, m.type, m.ne0, m.ne1, layer.n_expert, n_expert_used)) {
            free();
            throw Error(PYE_E_UNSUPPORTED, std::string(ggml_backend_dev_name(gpu)) +
                                               " has no kernels for experts of type " + ggml_type_name(m.type));
        }
        const ContextPtr ctx    = context_in(memory, 1);
        ggml_tensor *    pool   = ggml_new_tensor_3d(ctx.get(), m.type, m.ne0, m.ne1, n_slot);
        const size_t     size   = ggml_backend_buft_get_alloc_size(buft, pool) + kSlack;
        const bool       fits   = size <= ggml_backend_buft_get_max_size(buft);
        auto *           buffer = fits ? ggml_backend_buft_alloc_buffer(buft, size) : nullptr;
        if (buffer == nullptr) {
            free();
            throw Error(PYE_E_MEMORY, std::string(ggml_backend_dev_name(gpu)) + " has no " + std::to_string(size) +
                                          " bytes in one piece for " + std::to_string(n_slot) + " expert slots");
        }
        ggml_backend_buffer_set_usage(buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        ggml_backend_buffer_clear(buffer, 0); // what kernels read past a row must be numbers
        ggml_backend_tensor_alloc(buffer, pool, ggml_backend_buffer_get_base(buffer));
        matrices_.push_back({m.type, m.ne0, m.ne1, m.bytes, buffer, static_cast<uint8_t *>(pool->data)});
    }
}

DeviceArena::~DeviceArena() { free(); }

void DeviceArena::free() {
    for (const Matrix & m : matrices_) {
        ggml_backend_buffer_free(m.buffer);
    }
    matrices_.clear();
}

void DeviceArena::write(uint32_t slot, uint32_t place, const uint8_t * bytes) {
    const Matrix & m = matrices_[place];
    ggml_tensor    t = bytes_at(m.buffer, m.base + slot * m.bytes, m.bytes);
    ggml_backend_tensor_set(&t, bytes, 0, m.bytes);
}

void DeviceArena::read(uint32_t slot, uint32_t place, uint8_t * bytes) const {
    const Matrix &    m = matrices_[place];
    const ggml_tensor t = bytes_at(m.buffer, m.base + slot * m.bytes, m.bytes);
    ggml_backend_tensor_get(&t, bytes, 0, m.bytes);
}

ggml_tensor * DeviceArena::view(ggml_context * ctx, uint32_t place, uint32_t first, uint32_t n) const {
    const Matrix & m = matrices_[place];
    ggml_tensor *  t = ggml_new_tensor_3d(ctx, m.type, m.ne0, m.ne1, n);
    t->data          = m.base + first * m.bytes;
    t->buffer        = m.buffer;
    return t;
}

ggml_tensor * DeviceArena::view_pair(ggml_context *, uint32_t, uint32_t, uint32_t) const {
    throw Error(PYE_E_STATE, "a GPU's slots keep gate and up apart");
}

std::string DeviceArena::layout(uint32_t place) const { return ggml_type_name(matrices_[place].type); }

} // namespace pye
