#include "slot_arena.h"

#include "checksum.h"
#include "error.h"
#include "quiet_kernels.h"
#include "scratch.h"

#include "ggml-backend-impl.h"
#include "ggml-cpu.h"

#include <algorithm>
#include <cstring>

namespace pye {

namespace {

constexpr size_t kSlack = 512; // some kernels read a little past the last row

ggml_backend_buffer_type_t * extra_buffer_types(ggml_backend_dev_t cpu) {
    auto get = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu), "ggml_backend_dev_get_extra_bufts"));
    return get == nullptr ? nullptr : get(cpu);
}

} // namespace

SlotArena::SlotArena(const ShapeClass & shape, const ExpertLayer & layer, uint32_t n_slot, uint32_t n_expert_used)
    : stride_(shape.stride), size_(shape.stride * n_slot + platform::kPage) {
    static_assert(kSlack <= platform::kPage, "the slack fits in the page behind the last slot");
    base_ = static_cast<uint8_t *>(platform::reserve_memory(size_));
    if (base_ == nullptr) {
        throw Error(PYE_E_MEMORY, "cannot reserve " + std::to_string(size_) + " bytes of addresses for expert slots");
    }
    populated_ = std::make_unique<std::atomic<bool>[]>(n_slot);
    for (const ExpertMatrix & m : layer.matrices) {
        matrices_.push_back({m.type, m.ne0, m.ne1, m.bytes, m.in_slot});
        choose_layout(matrices_.back(), layer.n_expert, n_expert_used);
    }
}

SlotArena::~SlotArena() {
    for (Matrix & m : matrices_) {
        ggml_backend_buffer_free(m.buffer);
    }
    platform::unmap(base_, size_);
}

// Stock llama.cpp stores a weight in the first extra buffer type that can multiply from it; so do we, and then the same
// kernels give the same bits. Other extra types than the repacking one change a tensor's size or need every expert of a
// tensor at once; none of them takes expert weights today.
void SlotArena::choose_layout(Matrix & m, uint32_t n_expert, uint32_t n_expert_used) {
    ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    for (auto * buft = extra_buffer_types(cpu); buft != nullptr && *buft != nullptr; ++buft) {
        if (strcmp(ggml_backend_buft_name(*buft), "CPU_REPACK") != 0 ||
            !multiplies_from(cpu, *buft, m.type, m.ne0, m.ne1, n_expert, n_expert_used)) {
            continue;
        }
        // A small buffer of that type lends its functions; ours has the same functions over our own memory.
        ggml_backend_buffer_t donor = ggml_backend_buft_alloc_buffer(*buft, platform::kPage);
        std::vector<char>     memory;
        const ContextPtr      ctx = context_in(memory, 1);
        ggml_tensor *         t   = ggml_new_tensor_3d(ctx.get(), m.type, m.ne0, m.ne1, n_expert);
        if (donor == nullptr) {
            throw Error(PYE_E_MEMORY, "cannot allocate a page for the repacked layout");
        }
        donor->iface.init_tensor(donor, t);
        ggml_backend_buffer_i iface = donor->iface;
        iface.free_buffer           = nullptr; // the arena owns the memory
        m.buffer                    = ggml_backend_buffer_init(*buft, iface, base_, size_);
        m.extra                     = t->extra;
        m.repacked                  = true;
        ggml_backend_buffer_free(donor);
        return;
    }
    m.buffer = ggml_backend_cpu_buffer_from_ptr(base_, size_);
}

void SlotArena::write(uint32_t slot, uint32_t place, const uint8_t * bytes) {
    uint8_t * at = base_ + slot * stride_;
    // First use of the slot: take its pages here, on the I/O thread, so that kernels never fault.
    if (!populated_[slot].exchange(true, std::memory_order_relaxed)) {
        platform::populate(at, stride_);
    }
    const Matrix & m = matrices_[place];
    at += m.in_slot;
    if (!m.repacked) {
        memcpy(at, bytes, m.bytes);
        return;
    }
    repack(m, m.ne1, bytes, at);
}

void SlotArena::read(uint32_t, uint32_t, uint8_t *) const {
    throw Error(PYE_E_STATE, "slots for the CPU's kernels have nothing below them but the disk");
}

void SlotArena::repack(const Matrix & m, int64_t ne1, const uint8_t * bytes, uint8_t * to) {
    ggml_tensor t = {};
    t.type        = m.type;
    t.buffer      = m.buffer;
    t.data        = to;
    t.extra       = m.extra;
    t.ne[0]       = m.ne0;
    t.ne[1]       = ne1;
    t.ne[2] = t.ne[3] = 1;
    t.nb[0]           = ggml_type_size(m.type);
    t.nb[1]           = ggml_row_size(m.type, m.ne0);
    t.nb[2] = t.nb[3] = t.nb[1] * ne1;
    const QuietKernels quiet;
    m.buffer->iface.set_tensor(m.buffer, &t, bytes, 0, t.nb[2]);
}

uint64_t SlotArena::signature(uint32_t place) const {
    const Matrix & m = matrices_[place];
    if (!m.repacked) {
        return 0;
    }
    // Layouts interleave a few rows and repeat: some rows tell it, as long as their number divides like the whole.
    constexpr int64_t    kRows = 64;
    const int64_t        ne1   = m.ne1 <= kRows ? m.ne1 : kRows + m.ne1 % kRows;
    const size_t         size  = ggml_row_size(m.type, m.ne0) * ne1;
    std::vector<uint8_t> pattern(size), packed(size + kSlack);
    for (size_t i = 0; i < size; ++i) {
        pattern[i] = static_cast<uint8_t>(i * 167 + (i >> 8) * 13 + (i >> 16) * 7);
    }
    auto at = reinterpret_cast<uintptr_t>(packed.data());
    at      = (at + 63) / 64 * 64; // fits in the slack
    repack(m, ne1, pattern.data(), reinterpret_cast<uint8_t *>(at));
    return checksum(reinterpret_cast<const uint8_t *>(at), size);
}

void SlotArena::release(uint32_t slot) {
    populated_[slot].store(false, std::memory_order_relaxed);
    platform::release(base_ + slot * stride_, stride_);
}

ggml_tensor * SlotArena::view(ggml_context * ctx, uint32_t place, uint32_t first, uint32_t n) const {
    const Matrix & m = matrices_[place];
    ggml_tensor *  t = ggml_new_tensor_3d(ctx, m.type, m.ne0, m.ne1, n);
    t->nb[2]         = stride_;
    t->nb[3]         = stride_ * n;
    t->data          = base_ + first * stride_ + m.in_slot;
    t->buffer        = m.buffer;
    t->extra         = m.extra;
    return t;
}

bool SlotArena::pairs_with_next(uint32_t place) const {
    if (place + 1 >= matrices_.size()) {
        return false;
    }
    const Matrix &a = matrices_[place], &b = matrices_[place + 1];
    return a.type == b.type && a.ne0 == b.ne0 && a.ne1 == b.ne1 && a.extra == b.extra &&
           a.in_slot + a.bytes == b.in_slot;
}

ggml_tensor * SlotArena::view_pair(ggml_context * ctx, uint32_t place, uint32_t first, uint32_t n) const {
    ggml_tensor * t = view(ctx, place, first, n);
    t->ne[1] *= 2;
    return t;
}

bool SlotArena::rounds_alike() const {
    return std::all_of(matrices_.begin(), matrices_.end(), [](const Matrix & m) {
        const ggml_type rows = ggml_get_type_traits_cpu(m.type)->vec_dot_type;
        return rows == GGML_TYPE_Q8_0 || rows == GGML_TYPE_Q8_1;
    });
}

std::string SlotArena::layout(uint32_t place) const {
    return std::string(ggml_type_name(matrices_[place].type)) + (matrices_[place].repacked ? " repacked" : "");
}

} // namespace pye
