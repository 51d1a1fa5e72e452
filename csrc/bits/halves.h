// Widths that divide 8 with AVX2: vectors of bytes are halved into vectors of nibbles, those into pairs, those into
// bits.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace bitorch_engine {

// Numbers of 2 * bits bits in `count` vectors to numbers of `bits` bits in twice as many, the lower half of each first.
template <int bits, int count>
static inline void halve(__m256i* v) {
  const __m256i mask = _mm256_set1_epi8((1 << bits) - 1);
#pragma GCC unroll 4
  for (int i = count - 1; i >= 0; --i) {
    const __m256i all = _mm256_permute4x64_epi64(v[i], 0xd8);  // unpacking takes the lower half of each 128 bits
    const __m256i low = _mm256_and_si256(all, mask), high = _mm256_and_si256(_mm256_srli_epi16(all, bits), mask);
    v[2 * i] = _mm256_unpacklo_epi8(low, high);
    v[2 * i + 1] = _mm256_unpackhi_epi8(low, high);
  }
}

// 32 bytes of a stream are 8 / bits vectors of values, of each of which then(vector) is stored. Returns how many values
// were done.
template <int bits, class Then>
static inline int64_t unpack_vectors(const uint8_t* packed, uint8_t* values, int64_t count, const Then& then) {
  constexpr int vectors = 8 / bits;
  int64_t i = 0;
  for (; i + 32 * vectors <= count; i += 32 * vectors, packed += 32) {
    __m256i v[vectors];
    v[0] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
    halve<4, 1>(v);
    if constexpr (bits <= 2) halve<2, 2>(v);
    if constexpr (bits == 1) halve<1, 4>(v);
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + i + 32 * j), then(v[j]));
  }
  return i;
}

}  // namespace bitorch_engine
