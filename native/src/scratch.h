// Scratch memory of the expert FFN: buffers that are kept from call to call, and ggml contexts that own no data.
#pragma once

#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace pye {

// Hands out aligned pieces of a buffer that it first makes large enough.
class Pieces {
  public:
    Pieces(std::vector<char> & buffer, size_t need) {
        if (buffer.size() < need + kAlign) {
            buffer.resize(need + kAlign);
        }
        at_ = reinterpret_cast<char *>(rounded(reinterpret_cast<uintptr_t>(buffer.data())));
    }
    // Of memory that is large enough and aligned.
    explicit Pieces(char * at) : at_(at) {}
    static size_t rounded(size_t n) { return (n + kAlign - 1) / kAlign * kAlign; }
    char *        take(size_t n) {
        char * p = at_;
        at_ += rounded(n);
        return p;
    }

  private:
    static constexpr size_t kAlign = 64;

    char * at_;
};

struct ContextFree {
    void operator()(ggml_context * c) const { ggml_free(c); }
};
using ContextPtr = std::unique_ptr<ggml_context, ContextFree>;

// A context of tensors without data, and of one graph, in memory that the caller keeps.
inline ContextPtr context_in(std::vector<char> & memory, size_t n_tensor) {
    const size_t size = n_tensor * ggml_tensor_overhead() + ggml_graph_overhead_custom(n_tensor, false) + 64;
    if (memory.size() < size) {
        memory.resize(size);
    }
    return ContextPtr(ggml_init({memory.size(), memory.data(), /*no_alloc=*/true}));
}

// Some bytes of a back-end's buffer as a tensor, to copy to or from.
inline ggml_tensor bytes_at(ggml_backend_buffer * buffer, void * data, size_t size) {
    ggml_tensor t = {};
    t.type        = GGML_TYPE_I8;
    t.buffer      = buffer;
    t.data        = data;
    t.ne[0]       = static_cast<int64_t>(size);
    t.ne[1] = t.ne[2] = t.ne[3] = 1;
    t.nb[0]                     = 1;
    t.nb[1] = t.nb[2] = t.nb[3] = size;
    return t;
}

} // namespace pye
