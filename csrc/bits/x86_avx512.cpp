#include <immintrin.h>

#include "bits/bits.h"

namespace bitorch_engine {

// 64 values are 8 * bits bytes. Each group of eight goes to a 64-bit lane, where every byte picks its own eight bits.
void unpack_avx512(const uint8_t* packed, uint8_t* values, int64_t count, int bits) {
  alignas(64) uint8_t lanes[64], shifts[64];
  for (int i = 0; i < 64; ++i) {
    lanes[i] = static_cast<uint8_t>(i / 8 * bits + i % 8);
    shifts[i] = static_cast<uint8_t>(i % 8 * bits);
  }
  const __m512i lane = _mm512_load_si512(lanes), shift = _mm512_load_si512(shifts);
  const __m512i mask = _mm512_set1_epi8(static_cast<char>((1 << bits) - 1));
  const __mmask64 present = bits == 8 ? ~uint64_t{0} : (uint64_t{1} << (8 * bits)) - 1;
  int64_t i = 0;
  for (; i + 64 <= count; i += 64, packed += 8 * bits) {
    const __m512i bytes = _mm512_permutexvar_epi8(lane, _mm512_maskz_loadu_epi8(present, packed));
    _mm512_storeu_si512(values + i, _mm512_and_si512(_mm512_multishift_epi64_epi8(shift, bytes), mask));
  }
  unpack_scalar(packed, values + i, count - i, bits);
}

}  // namespace bitorch_engine
