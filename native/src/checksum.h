// The checksum of bundles: XXH3, 64 bits, seed 0.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pye {

uint64_t checksum(const void * bytes, size_t n);

// Of bytes that come in several parts.
class Checksum {
  public:
    Checksum();
    ~Checksum();
    Checksum(const Checksum &)             = delete;
    Checksum & operator=(const Checksum &) = delete;

    void     add(const void * bytes, size_t n);
    uint64_t value() const;

  private:
    void * state_;
};

} // namespace pye
