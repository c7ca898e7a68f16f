// The buffer type of expert tensors: reserves addresses, stores nothing.
#pragma once

#include "engine.h"

namespace pye {

// What a tensor's `extra` points at: whose weight it is.
struct Binding {
    Engine * engine;
    uint32_t layer;
    uint32_t place;
};

// The binding of a tensor that lies in one of our buffers, else nullptr.
const Binding * binding_of(const ggml_tensor * tensor);
bool            is_expert_buffer_type(ggml_backend_buffer_type_t buft);

} // namespace pye
