#include "slot_memory.h"

#include "scratch.h"

#include "ggml-backend-impl.h"

namespace pye {

bool multiplies_from(ggml_backend_dev_t device, ggml_backend_buffer_type_t buft, ggml_type type, int64_t ne0,
                     int64_t ne1, uint32_t n_expert, uint32_t n_expert_used) {
    constexpr int64_t kTokens = 512;
    std::vector<char> memory;
    const auto        ctx = context_in(memory, 8);
    ggml_tensor *     w   = ggml_new_tensor_3d(ctx.get(), type, ne0, ne1, n_expert);
    ggml_tensor *     x   = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, ne0, n_expert_used, kTokens);
    ggml_tensor *     ids = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, n_expert_used, kTokens);
    ggml_tensor *     op  = ggml_mul_mat_id(ctx.get(), w, x, ids);
    w->buffer             = ggml_backend_buft_alloc_buffer(buft, 0);
    const bool yes        = w->buffer != nullptr && ggml_backend_dev_supports_op(device, op);
    ggml_backend_buffer_free(w->buffer);
    return yes;
}

ggml_backend_buffer_type_t host_buffer_type(ggml_backend_dev_t device) {
    ggml_backend_buffer_type_t buft = ggml_backend_dev_host_buffer_type(device);
    return buft != nullptr ? buft : ggml_backend_cpu_buffer_type();
}

} // namespace pye
