#include "bits/bits.h"

namespace bitorch_engine {

// Eight values of `bits` bits are one little-endian number of `bits` bytes.
void pack_scalar(const uint8_t* values, uint8_t* packed, int64_t count, int bits) {
  for (int64_t i = 0; i < count; i += 8) {
    uint64_t word = 0;
    for (int j = 0; j < 8; ++j) word |= uint64_t{values[i + j]} << (j * bits);
    for (int j = 0; j < bits; ++j) *packed++ = static_cast<uint8_t>(word >> (8 * j));
  }
}

void unpack_scalar(const uint8_t* packed, uint8_t* values, int64_t count, int bits) {
  const uint64_t mask = (1u << bits) - 1;
  for (int64_t i = 0; i < count; i += 8) {
    uint64_t word = 0;
    for (int j = 0; j < bits; ++j) word |= uint64_t{*packed++} << (8 * j);
    for (int j = 0; j < 8; ++j) values[i + j] = static_cast<uint8_t>(word >> (j * bits) & mask);
  }
}

}  // namespace bitorch_engine
