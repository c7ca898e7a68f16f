// Computing a run of llama.cpp's nodes a second time: whether that gives the same again, and what must be put back first.
#pragma once

#include "ggml-backend.h"
#include "ggml.h"

#include <vector>

namespace pye {

struct MemoryRange {
    char *                begin;
    size_t                size;
    ggml_backend_buffer_t buffer;
};

MemoryRange range_of(const ggml_tensor * t);
bool        same(const MemoryRange & a, const MemoryRange & b);

// Whether nodes [begin, end) leave nothing behind but their results, and rows of a KV cache at places that are given to them.
// Recurrent models, for one, change their state.
bool can_be_repeated(ggml_cgraph * graph, int begin, int end);

// What these nodes read and also overwrite: the allocator gives memory away after its last use.
std::vector<MemoryRange> overwritten_inputs(ggml_cgraph * graph, int begin, int end);

} // namespace pye
