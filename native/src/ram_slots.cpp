#include "ram_slots.h"

#include "error.h"

#include <cstring>

namespace pye {

void RamSlots::write(uint32_t slot, uint32_t place, const uint8_t * bytes) {
    const ExpertMatrix & m = layer_.matrices[place];
    memcpy(at(slot) + m.in_slot, bytes, m.bytes);
}

void RamSlots::read(uint32_t slot, uint32_t place, uint8_t * bytes) const {
    const ExpertMatrix & m = layer_.matrices[place];
    memcpy(bytes, base_ + slot * stride_ + m.in_slot, m.bytes);
}

ggml_tensor * RamSlots::view(ggml_context * ctx, uint32_t place, uint32_t first, uint32_t n) const {
    const ExpertMatrix & m = layer_.matrices[place];
    ggml_tensor *        t = ggml_new_tensor_3d(ctx, m.type, m.ne0, m.ne1, n);
    t->nb[2]               = stride_;
    t->nb[3]               = stride_ * n;
    t->data                = base_ + first * stride_ + m.in_slot;
    t->buffer              = buffer_;
    return t;
}

ggml_tensor * RamSlots::view_pair(ggml_context *, uint32_t, uint32_t, uint32_t) const {
    throw Error(PYE_E_STATE, "the RAM tier keeps gate and up apart");
}

std::string RamSlots::layout(uint32_t place) const { return ggml_type_name(layer_.matrices[place].type); }

} // namespace pye
