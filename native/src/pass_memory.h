// Where the activations and index lists of a pass lie: where its kernels can read them.
#pragma once

#include "scratch.h"

#include "ggml-backend.h"

#include <vector>

namespace pye {

class PassMemory {
  public:
    PassMemory()          = default;
    virtual ~PassMemory() = default;

    PassMemory(const PassMemory &)             = delete;
    PassMemory & operator=(const PassMemory &) = delete;

    // Room for the next pass, aligned; that of the last one is no longer needed. Throws Error(PYE_E_MEMORY).
    virtual char * room(size_t size) = 0;
    // What the room belongs to; nullptr: ordinary memory.
    virtual ggml_backend_buffer_t buffer() const = 0;
    // Lists are at the beginning of the room: where to write their first `size` bytes, and what to do afterwards.
    virtual char * lists(size_t size)         = 0;
    virtual void   lists_written(size_t size) = 0;
};

// Of passes on the CPU.
class HostPassMemory : public PassMemory {
  public:
    char * room(size_t size) override {
        at_ = Pieces(memory_, size).take(size);
        return at_;
    }
    ggml_backend_buffer_t buffer() const override { return nullptr; }
    char *                lists(size_t) override { return at_; }
    void                  lists_written(size_t) override {}

  private:
    std::vector<char> memory_;
    char *            at_ = nullptr;
};

} // namespace pye
