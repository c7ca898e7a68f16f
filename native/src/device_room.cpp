#include "device_room.h"

#include "error.h"

#include "ggml-backend-impl.h"

namespace pye {

namespace {

ggml_backend_buffer_type_t host_buffer_type(ggml_backend_t gpu) {
    ggml_backend_buffer_type_t buft = ggml_backend_dev_host_buffer_type(ggml_backend_get_device(gpu));
    return buft != nullptr ? buft : ggml_backend_cpu_buffer_type();
}

} // namespace

bool BackendRoom::reserve(size_t size) {
    if (size <= size_) {
        return false;
    }
    ggml_backend_synchronize(gpu_);
    ggml_backend_buffer_free(buffer_);
    size_   = 0;
    buffer_ = ggml_backend_buft_alloc_buffer(buft_, size + size / 4);
    if (buffer_ == nullptr) {
        throw Error(PYE_E_MEMORY, std::string(ggml_backend_buft_name(buft_)) + " has no " + std::to_string(size) +
                                      " bytes for computing experts");
    }
    size_ = size + size / 4;
    return true;
}

DeviceRoom::DeviceRoom(ggml_backend_t gpu) : BackendRoom(gpu, ggml_backend_get_default_buffer_type(gpu)) {}
HostRoom::HostRoom(ggml_backend_t gpu) : BackendRoom(gpu, host_buffer_type(gpu)) {}

void copy_to_device(ggml_backend_t gpu, const BackendRoom & room, size_t offset, const void * from, size_t size) {
    ggml_tensor t = {};
    t.type        = GGML_TYPE_I8;
    t.buffer      = room.buffer();
    t.data        = room.base() + offset;
    t.ne[0]       = static_cast<int64_t>(size);
    t.ne[1] = t.ne[2] = t.ne[3] = 1;
    t.nb[0]                     = 1;
    t.nb[1] = t.nb[2] = t.nb[3] = size;
    ggml_backend_tensor_set_async(gpu, &t, from, 0, size);
}

} // namespace pye
