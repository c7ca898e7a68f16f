// Scratch memory of a GPU stream: on the device, and on the host where the device copies to and from it fastest. Kept from
// call to call, grows when it must.
#pragma once

#include "pass_memory.h"

#include "ggml-backend.h"

namespace pye {

class BackendRoom {
  public:
    // `gpu` must outlive this.
    BackendRoom(ggml_backend_t gpu, ggml_backend_buffer_type_t buft) : gpu_(gpu), buft_(buft) {}
    ~BackendRoom() { ggml_backend_buffer_free(buffer_); }

    BackendRoom(const BackendRoom &)             = delete;
    BackendRoom & operator=(const BackendRoom &) = delete;

    // At least so many bytes; what was in it is lost if it must grow, which waits for the device.
    // Throws Error(PYE_E_MEMORY).
    void                  reserve(size_t size);
    char *                base() const { return static_cast<char *>(ggml_backend_buffer_get_base(buffer_)); }
    ggml_backend_buffer_t buffer() const { return buffer_; }

  private:
    ggml_backend_t             gpu_;
    ggml_backend_buffer_type_t buft_;
    ggml_backend_buffer_t      buffer_ = nullptr;
    size_t                     size_   = 0;
};

class DeviceRoom : public BackendRoom {
  public:
    explicit DeviceRoom(ggml_backend_t gpu);
};

class HostRoom : public BackendRoom {
  public:
    explicit HostRoom(ggml_backend_t gpu);
};

// Copies to the device in the order of its stream; `from` must stay until it has.
void copy_to_device(ggml_backend_t gpu, const BackendRoom & room, size_t offset, const void * from, size_t size);

// Of passes on a GPU.
class DevicePassMemory : public PassMemory {
  public:
    explicit DevicePassMemory(ggml_backend_t gpu) : gpu_(gpu), device_(gpu), host_(gpu) {}

    char * room(size_t size) override {
        device_.reserve(size);
        return device_.base();
    }
    ggml_backend_buffer_t buffer() const override { return device_.buffer(); }
    char *                lists(size_t size) override {
        host_.reserve(size);
        return host_.base();
    }
    void lists_written(size_t size) override { copy_to_device(gpu_, device_, 0, host_.base(), size); }

  private:
    ggml_backend_t gpu_;
    DeviceRoom     device_;
    HostRoom       host_;
};

} // namespace pye
