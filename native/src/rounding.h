// To multiples of anything.
#pragma once

#include <cstdint>

namespace pye {

inline uint64_t round_down(uint64_t x, uint64_t to) { return x / to * to; }
inline uint64_t round_up(uint64_t x, uint64_t to) { return (x + to - 1) / to * to; }

} // namespace pye
