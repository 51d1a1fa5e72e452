#include <immintrin.h>

#include "gradient/body.h"

namespace bitorch_engine {
namespace {

__m256i hash32(__m256i x) {
  x = _mm256_mullo_epi32(_mm256_xor_si256(x, _mm256_srli_epi32(x, 16)), _mm256_set1_epi32(0x7feb352d));
  x = _mm256_mullo_epi32(_mm256_xor_si256(x, _mm256_srli_epi32(x, 15)),
                         _mm256_set1_epi32(static_cast<int>(0x846ca68bu)));
  return _mm256_xor_si256(x, _mm256_srli_epi32(x, 16));
}

// The codes of eight values, rounded up with the probability of their fractions.
__m256i round_eight(__m256 value, __m256 inverse, __m256i noise, __m256i limit) {
  const __m256 uniform = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_srli_epi32(noise, 8)), _mm256_set1_ps(0x1p-24f));
  const __m256 size = _mm256_mul_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), value), inverse);
  const __m256 number = _mm256_max_ps(size, _mm256_setzero_ps());  // NaN: 0
  const __m256 bounded = _mm256_min_ps(number, _mm256_set1_ps(128.0f));
  const __m256i whole = _mm256_cvttps_epi32(bounded);
  const __m256 fraction = _mm256_sub_ps(bounded, _mm256_cvtepi32_ps(whole));
  const __m256i up = _mm256_castps_si256(_mm256_cmp_ps(uniform, fraction, _CMP_LT_OQ));  // -1 or 0
  const __m256i kept = _mm256_min_epi32(_mm256_sub_epi32(whole, up), limit);
  const __m256i sign = _mm256_srai_epi32(_mm256_castps_si256(value), 31);
  return _mm256_sub_epi32(_mm256_xor_si256(kept, sign), sign);
}

// 32 values at a time, whose indices all fit 32 bits. Returns how many were done.
template <bool factor_each, bool inverse_each>
int64_t round_vectors(const float* x, int64_t count, const Rounding& r, uint64_t first, uint64_t stride,
                      int8_t* codes) {
  const __m256 factor = _mm256_set1_ps(r.factor && !factor_each ? *r.factor : 1.0f);
  const __m256 inverse = _mm256_set1_ps(*r.inverse);
  const __m256i limit = _mm256_set1_epi32(static_cast<int>(r.limit)),
                seed = _mm256_set1_epi32(static_cast<int>(r.seed));
  const int step = static_cast<int>(stride);
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), next = _mm256_set1_epi32(8 * step);
  __m256i index = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(first)),
                                   _mm256_mullo_epi32(lanes, _mm256_set1_epi32(step)));
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    __m256i code[4];
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j) {
      const int64_t at = i + 8 * j;
      const __m256 value =
          _mm256_mul_ps(_mm256_loadu_ps(x + at), factor_each ? _mm256_loadu_ps(r.factor + at) : factor);
      const __m256i noise = hash32(_mm256_xor_si256(index, seed));
      code[j] = round_eight(value, inverse_each ? _mm256_loadu_ps(r.inverse + at) : inverse, noise, limit);
      index = _mm256_add_epi32(index, next);
    }
    // Packing works within 128-bit lanes; the permutation repairs the order.
    const __m256i low = _mm256_packs_epi32(code[0], code[1]), high = _mm256_packs_epi32(code[2], code[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), bytes);
  }
  return i;
}

// What is the same for all values of a call of straight_through.
struct Mask {
  __m256 low, step;
  __m256i top, sign;  // sign: all ones at 1 bit

  // Eight values: writes what is kept of their gradients, and returns gradient times slope.
  __m256 operator()(const float* grad, const uint8_t* index, const uint8_t* beyond, float* kept) const {
    const __m256i at = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(index)));
    const __m256i outside = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(beyond)));
    const __m256 g = _mm256_loadu_ps(grad), code = _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(at), step), low);
    const __m256i beyond_it = _mm256_cmpgt_epi32(outside, _mm256_setzero_si256());
    const __m256i lowest = _mm256_cmpeq_epi32(at, _mm256_setzero_si256()), highest = _mm256_cmpeq_epi32(at, top);
    const __m256i clipped = _mm256_and_si256(beyond_it, _mm256_or_si256(lowest, highest));
    const __m256i quarter =
        _mm256_xor_si256(_mm256_castps_si256(_mm256_set1_ps(0.25f)), _mm256_slli_epi32(beyond_it, 31));
    const __m256 error = _mm256_castsi256_ps(_mm256_andnot_si256(lowest, quarter));
    const __m256 slope = _mm256_blendv_ps(error, code, _mm256_castsi256_ps(_mm256_or_si256(sign, clipped)));
    _mm256_storeu_ps(kept, _mm256_andnot_ps(_mm256_castsi256_ps(clipped), g));
    return _mm256_mul_ps(g, slope);
  }
};

}  // namespace

void largest_by_column_avx2(const float* x, int64_t rows, int64_t columns, float* found) {
  largest_by_column(x, rows, columns, found);
}

float largest_avx2(const float* x, int64_t count) { return largest(x, count); }

void round_avx2(const float* x, int64_t count, const Rounding& rounding, uint64_t first, uint64_t stride,
                int8_t* codes) {
  const bool factor_each = rounding.factor && rounding.factor_step, inverse_each = rounding.inverse_step != 0;
  int64_t done = 0;
  if ((first + static_cast<uint64_t>(count) * stride) >> 32 == 0)
    done = (factor_each ? inverse_each ? round_vectors<true, true> : round_vectors<true, false>
            : inverse_each ? round_vectors<false, true>
                           : round_vectors<false, false>)(x, count, rounding, first, stride, codes);
  Rounding rest = rounding;
  if (factor_each) rest.factor += done;
  if (inverse_each) rest.inverse += done;
  round(x + done, count - done, rest, first + static_cast<uint64_t>(done) * stride, stride, codes + done);
}

double straight_through_avx2(const float* grad, const uint8_t* index, const uint8_t* beyond, int64_t count, float low,
                             int bits, float* out) {
  const Mask mask{_mm256_set1_ps(low), _mm256_set1_ps(bits == 1 ? 2.0f : 1.0f), _mm256_set1_epi32((1 << bits) - 1),
                  _mm256_set1_epi32(bits == 1 ? -1 : 0)};
  const int64_t whole = count / COUNT * COUNT;
  double sum = 0;
  for (int64_t start = 0; start < whole; start += COUNT) {
    __m256 left = _mm256_setzero_ps(), right = _mm256_setzero_ps();
    for (int64_t i = start; i < start + COUNT; i += VECTOR) {
      left = _mm256_add_ps(left, mask(grad + i, index + i, beyond + i, out + i));
      right = _mm256_add_ps(right, mask(grad + i + 8, index + i + 8, beyond + i + 8, out + i + 8));
    }
    float lanes[VECTOR];
    _mm256_storeu_ps(lanes, left);
    _mm256_storeu_ps(lanes + 8, right);
    for (float lane : lanes) sum += static_cast<double>(lane);
  }
  return straight_through(grad + whole, index + whole, beyond + whole, count - whole, low, bits, out + whole, sum);
}

}  // namespace bitorch_engine
