#include <immintrin.h>

#include "linear/digits.h"
#include "linear/linear.h"
#include "qconv/qconv.h"

namespace bitorch_engine {
namespace {

constexpr int64_t WIDTH = 64, ROWS_AT_ONCE = 4;

// Value `place` of each byte; of 1 bit, twice that.
template <int BITS>
inline __m512i values(__m512i bytes, int place) {
  if (BITS == 1) {
    const __m512i at_1 = place ? _mm512_srli_epi16(bytes, static_cast<unsigned>(place - 1)) : _mm512_add_epi8(bytes, bytes);
    return _mm512_and_si512(at_1, _mm512_set1_epi8(2));
  }
  const __m512i shifted = _mm512_srli_epi16(bytes, static_cast<unsigned>(place * BITS));
  return _mm512_and_si512(shifted, _mm512_set1_epi8((1 << BITS) - 1));
}

template <int BITS>
void dot_four(const uint8_t* const* rows, int64_t row_bytes, const Digits& x, float* sums) {
  constexpr int64_t BYTES = GROUP * BITS / 8;
  __m512 sum[ROWS_AT_ONCE];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS_AT_ONCE; ++r) sum[r] = _mm512_setzero_ps();
  const int8_t* digits = x.digits;
  for (int64_t start = 0, g = 0; start < row_bytes; start += BYTES, ++g) {
    const int32_t* corrections = x.corrections + 48 * g;
    __m512i total[ROWS_AT_ONCE][3];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS_AT_ONCE; ++r)
#pragma GCC unroll 3
      for (int d = 0; d < 3; ++d) total[r][d] = _mm512_loadu_si512(corrections + 16 * d);
    const int64_t end = start + BYTES < row_bytes ? start + BYTES : row_bytes;
    for (int64_t place = start; place < end; place += WIDTH, digits += 3 * WIDTH * (8 / BITS)) {
      const int64_t left = row_bytes - place;  // what follows is another row, or not there
      const __mmask64 mask = left >= WIDTH ? ~uint64_t{0} : (uint64_t{1} << left) - 1;
      __m512i bytes[ROWS_AT_ONCE];
#pragma GCC unroll 4
      for (int r = 0; r < ROWS_AT_ONCE; ++r) bytes[r] = _mm512_maskz_loadu_epi8(mask, rows[r] + place);
#pragma GCC unroll 8
      for (int j = 0; j < 8 / BITS; ++j) {
        const int8_t* d = digits + 3 * WIDTH * j;
        const __m512i low = _mm512_loadu_si512(d), middle = _mm512_loadu_si512(d + WIDTH);
        const __m512i high = _mm512_loadu_si512(d + 2 * WIDTH);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS_AT_ONCE; ++r) {
          const __m512i w = values<BITS>(bytes[r], j);
          total[r][0] = _mm512_dpbusd_epi32(total[r][0], w, low);
          total[r][1] = _mm512_dpbusd_epi32(total[r][1], w, middle);
          total[r][2] = _mm512_dpbusd_epi32(total[r][2], w, high);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS_AT_ONCE; ++r)
#pragma GCC unroll 3
      for (int d = 0; d < 3; ++d)
        sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total[r][d]), _mm512_set1_ps(x.scales[3 * g + d]), sum[r]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS_AT_ONCE; ++r) sums[r] = _mm512_reduce_add_ps(sum[r]);
}

}  // namespace

bool split_digits_avx512(const float* x, int bits, const Digits& to) { return split_digits<WIDTH>(x, bits, to); }

void dot_digits_avx512(const uint8_t* packed, int64_t row_bytes, int64_t count, int bits, const Digits& x,
                       float* sums) {
  const auto dot = bits == 1 ? dot_four<1> : bits == 2 ? dot_four<2> : dot_four<4>;
  for (int64_t first = 0; first < count; first += ROWS_AT_ONCE) {
    // Where fewer are left, the last one is multiplied again.
    const uint8_t* rows[ROWS_AT_ONCE];
    float four[ROWS_AT_ONCE];
    for (int64_t r = 0; r < ROWS_AT_ONCE; ++r)
      rows[r] = packed + (first + r < count ? first + r : count - 1) * row_bytes;
    dot(rows, row_bytes, x, four);
    for (int64_t r = 0; r < ROWS_AT_ONCE && first + r < count; ++r) sums[first + r] = four[r];
  }
}

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
