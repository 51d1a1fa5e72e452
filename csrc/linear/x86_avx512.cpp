#include <immintrin.h>

#include "linear/linear.h"
#include "qconv/qconv.h"

namespace bitorch_engine {

// 64 codes are decoded by three byte instructions (see bits/x86_avx512.cpp), widened to floats and multiplied.
float dot_avx512(const uint8_t* packed, const float* x, int64_t count, int bits) {
  alignas(64) uint8_t lanes[64], shifts[64];
  for (int i = 0; i < 64; ++i) {
    lanes[i] = static_cast<uint8_t>(i / 8 * bits + i % 8);
    shifts[i] = static_cast<uint8_t>(i % 8 * bits);
  }
  const __m512i lane = _mm512_load_si512(lanes), shift = _mm512_load_si512(shifts);
  const __m512i value = _mm512_set1_epi8(static_cast<char>((1 << bits) - 1));
  const __m512i low = _mm512_set1_epi8(static_cast<char>(lowest_code(bits)));
  const __mmask64 present = bits == 8 ? ~uint64_t{0} : (uint64_t{1} << 8 * bits) - 1;
  __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  int64_t k = 0;
  for (; k + 64 <= count; k += 64, packed += 8 * bits) {
    const __m512i bytes = _mm512_permutexvar_epi8(lane, _mm512_maskz_loadu_epi8(present, packed));
    __m512i index = _mm512_and_si512(_mm512_multishift_epi64_epi8(shift, bytes), value);
    if (bits == 1) index = _mm512_add_epi8(index, index);
    const __m512i codes = _mm512_add_epi8(index, low);
#define BE_QUARTER(q)                                                                                       \
  sums[q] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(codes, q))),  \
                            _mm512_loadu_ps(x + k + 16 * q), sums[q]);
    BE_QUARTER(0) BE_QUARTER(1) BE_QUARTER(2) BE_QUARTER(3)
#undef BE_QUARTER
  }
  const __m512 sum = _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
  return _mm512_reduce_add_ps(sum) + (k < count ? dot_scalar(packed, x + k, count - k, bits) : 0.0f);
}

}  // namespace bitorch_engine
