#include <immintrin.h>

#include <cstring>

#include "bits/bits.h"
#include "bits/halves.h"

namespace bitorch_engine {
namespace {

// The low `bits` bits of each of eight bytes: what PEXT gathers and PDEP scatters.
uint64_t value_mask(int bits) { return ((uint64_t{1} << bits) - 1) * 0x0101010101010101u; }

// The reverse of halve.
template <int bits, int count>
void join(__m256i* v) {
  const __m256i weights = _mm256_set1_epi16(1 | 1 << (8 + bits));
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) {
    const __m256i even = _mm256_maddubs_epi16(v[2 * i], weights), odd = _mm256_maddubs_epi16(v[2 * i + 1], weights);
    v[i] = _mm256_permute4x64_epi64(_mm256_packus_epi16(even, odd), 0xd8);
  }
}

template <int bits>
int64_t pack_vectors(const uint8_t* values, uint8_t* packed, int64_t count) {
  constexpr int vectors = 8 / bits;
  int64_t i = 0;
  for (; i + 32 * vectors <= count; i += 32 * vectors, packed += 32) {
    __m256i v[vectors];
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) v[j] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i + 32 * j));
    if constexpr (bits == 1) join<1, 4>(v);
    if constexpr (bits <= 2) join<2, 2>(v);
    join<4, 1>(v);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed), v[0]);
  }
  return i;
}

}  // namespace

void pack_avx2(const uint8_t* values, uint8_t* packed, int64_t count, int bits) {
  if (bits == 8) {
    std::memcpy(packed, values, count);
    return;
  }
  const uint64_t mask = value_mask(bits);
  const uint8_t* end = packed + count / 8 * bits;
  int64_t i = bits == 4   ? pack_vectors<4>(values, packed, count)
              : bits == 2 ? pack_vectors<2>(values, packed, count)
              : bits == 1 ? pack_vectors<1>(values, packed, count)
                          : 0;
  // Each store writes 8 bytes, of which the next one overwrites all but `bits`: not beyond the end.
  for (packed += i / 8 * bits; end - packed >= 8; i += 8, packed += bits) {
    uint64_t eight;
    __builtin_memcpy(&eight, values + i, 8);
    const uint64_t word = _pext_u64(eight, mask);
    __builtin_memcpy(packed, &word, 8);
  }
  pack_scalar(values + i, packed, count - i, bits);
}

void unpack_avx2(const uint8_t* packed, uint8_t* values, int64_t count, int bits) {
  if (bits == 8) {
    std::memcpy(values, packed, count);
    return;
  }
  const uint64_t mask = value_mask(bits);
  const uint8_t* end = packed + count / 8 * bits;
  const auto same = [](__m256i v) { return v; };
  int64_t i = bits == 4   ? unpack_vectors<4>(packed, values, count, same)
              : bits == 2 ? unpack_vectors<2>(packed, values, count, same)
              : bits == 1 ? unpack_vectors<1>(packed, values, count, same)
                          : 0;
  for (packed += i / 8 * bits; end - packed >= 8; i += 8, packed += bits) {
    uint64_t word;
    __builtin_memcpy(&word, packed, 8);
    const uint64_t eight = _pdep_u64(word, mask);
    __builtin_memcpy(values + i, &eight, 8);
  }
  unpack_scalar(packed, values + i, count - i, bits);
}

}  // namespace bitorch_engine
