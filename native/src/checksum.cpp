#include "checksum.h"

#include <new>

// All of it in this file: no library to link, no symbols to share with llama.cpp's own copy.
#define XXH_INLINE_ALL
#include "xxhash.h"

namespace pye {

uint64_t checksum(const void * bytes, size_t n) { return XXH3_64bits(bytes, n); }

Checksum::Checksum() : state_(XXH3_createState()) {
    if (state_ == nullptr) {
        throw std::bad_alloc();
    }
    XXH3_64bits_reset(static_cast<XXH3_state_t *>(state_));
}

Checksum::~Checksum() { XXH3_freeState(static_cast<XXH3_state_t *>(state_)); }

void Checksum::add(const void * bytes, size_t n) { XXH3_64bits_update(static_cast<XXH3_state_t *>(state_), bytes, n); }

uint64_t Checksum::value() const { return XXH3_64bits_digest(static_cast<const XXH3_state_t *>(state_)); }

} // namespace pye
