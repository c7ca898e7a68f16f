#include "device_room.h"

#include "error.h"
#include "slot_memory.h"

#include "ggml-backend-impl.h"

namespace pye {

void BackendRoom::reserve(size_t size) {
    if (size <= size_) {
        return;
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
}

DeviceRoom::DeviceRoom(ggml_backend_t gpu) : BackendRoom(gpu, ggml_backend_get_default_buffer_type(gpu)) {}
HostRoom::HostRoom(ggml_backend_t gpu) : BackendRoom(gpu, host_buffer_type(ggml_backend_get_device(gpu))) {}

void copy_to_device(ggml_backend_t gpu, const BackendRoom & room, size_t offset, const void * from, size_t size) {
    ggml_tensor t = bytes_at(room.buffer(), room.base() + offset, size);
    ggml_backend_tensor_set_async(gpu, &t, from, 0, size);
}

} // namespace pye
