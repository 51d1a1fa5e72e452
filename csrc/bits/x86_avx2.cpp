#include <immintrin.h>

#include "bits/bits.h"

namespace bitorch_engine {
namespace {

// The low `bits` bits of each of eight bytes: what PEXT gathers and PDEP scatters.
uint64_t value_mask(int bits) { return ((uint64_t{1} << bits) - 1) * 0x0101010101010101u; }

}  // namespace

void pack_avx2(const uint8_t* values, uint8_t* packed, int64_t count, int bits) {
  const uint64_t mask = value_mask(bits);
  int64_t i = 0;
  // Each store writes 8 bytes, of which the next one overwrites all but `bits`: not beyond the end.
  for (const uint8_t* end = packed + count / 8 * bits; end - packed >= 8; i += 8, packed += bits) {
    uint64_t eight;
    __builtin_memcpy(&eight, values + i, 8);
    const uint64_t word = _pext_u64(eight, mask);
    __builtin_memcpy(packed, &word, 8);
  }
  pack_scalar(values + i, packed, count - i, bits);
}

void unpack_avx2(const uint8_t* packed, uint8_t* values, int64_t count, int bits) {
  const uint64_t mask = value_mask(bits);
  int64_t i = 0;
  for (const uint8_t* end = packed + count / 8 * bits; end - packed >= 8; i += 8, packed += bits) {
    uint64_t word;
    __builtin_memcpy(&word, packed, 8);
    const uint64_t eight = _pdep_u64(word, mask);
    __builtin_memcpy(values + i, &eight, 8);
  }
  unpack_scalar(packed, values + i, count - i, bits);
}

}  // namespace bitorch_engine
