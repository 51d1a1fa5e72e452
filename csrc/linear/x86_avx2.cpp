#include <immintrin.h>

#include "linear/digits.h"
#include "linear/floats.h"
#include "linear/linear.h"
#include "qconv/qconv.h"

namespace bitorch_engine {
namespace {

constexpr int64_t WIDTH = 32;
constexpr int64_t AHEAD = 4096;  // bytes that are asked for before they are needed

using Lane = int16_t;

inline __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

// Value `place` of each byte; of 1 bit, twice that.
template <int BITS>
inline __m256i values(__m256i bytes, int place) {
  if (BITS == 1) {
    const __m256i at_1 = place ? _mm256_srli_epi16(bytes, place - 1) : _mm256_add_epi8(bytes, bytes);
    return _mm256_and_si256(at_1, _mm256_set1_epi8(2));
  }
  return _mm256_and_si256(_mm256_srli_epi16(bytes, place * BITS), _mm256_set1_epi8((1 << BITS) - 1));
}

inline float sum_of(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// The sums of a piece become floats.
template <int DIGITS>
inline __m256 scaled(const __m256i (&pairs)[DIGITS], const float* scales) {
  __m256 sum = _mm256_setzero_ps();
#pragma GCC unroll 4
  for (int d = 0; d < DIGITS; ++d) {
    const __m256i fours = _mm256_madd_epi16(pairs[d], _mm256_set1_epi16(1));
    sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(fours), _mm256_set1_ps(scales[d]), sum);
  }
  return sum;
}

// GROUPED: whether the weights have scales_a and scales_b.
template <int BITS, int DIGITS, bool GROUPED>
void dot_two(const uint8_t* a, const uint8_t* b, const float* scales_a, const float* scales_b, int64_t row_bytes,
             const Digits& x, float* sums) {
  const int64_t piece = GROUPED ? piece_columns(x.group, BITS, WIDTH) : GROUP, piece_bytes = piece * BITS / 8;
  // Groups of a piece, which are several where a vector has more columns than a group, and that of each lane.
  const int groups = GROUPED && x.group < piece ? static_cast<int>(piece / x.group) : 1;
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i group = _mm256_srli_epi32(_mm256_mullo_epi32(lanes, _mm256_set1_epi32(groups)), 3);
  __m256i present = _mm256_cmpgt_epi32(_mm256_set1_epi32(groups), lanes);
  __m256 sum_a = _mm256_setzero_ps(), sum_b = sum_a;
  const int8_t* digits = x.digits;
  const uint8_t* corrections = x.corrections;
  uint8_t last[2][GROUP * BITS / 8];
  for (int64_t start = 0; start < row_bytes; start += piece_bytes, corrections += DIGITS * WIDTH) {
    // Row b lies behind row a: memory is read in one stream, of which this is asked for before it is needed.
    for (int64_t line = 0; line < 2 * piece_bytes; line += 64) __builtin_prefetch(a + 2 * start + line + AHEAD);
    const uint8_t *from_a = a + start, *from_b = b + start;
    const int64_t left = row_bytes - start, bytes = left < piece_bytes ? left : piece_bytes;
    if (bytes % WIDTH) {  // what follows is another row, or not there
      __builtin_memset(last, 0, sizeof last);
      __builtin_memcpy(last[0], from_a, bytes);
      __builtin_memcpy(last[1], from_b, bytes);
      from_a = last[0];
      from_b = last[1];
      if (groups > 1)
        present = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(bytes * 8 / BITS / x.group)), lanes);
    }
    __m256i of_a[DIGITS], of_b[DIGITS];
#pragma GCC unroll 4
    for (int d = 0; d < DIGITS; ++d) of_a[d] = of_b[d] = load(corrections + d * WIDTH);
#pragma GCC unroll 1
    for (int64_t i = 0; i < bytes; i += WIDTH) {
#pragma GCC unroll 8
      for (int j = 0; j < 8 / BITS; ++j, digits += DIGITS * WIDTH) {
        const __m256i wa = values<BITS>(load(from_a + i), j), wb = values<BITS>(load(from_b + i), j);
#pragma GCC unroll 4
        for (int d = 0; d < DIGITS; ++d) {
          const __m256i digit = load(digits + d * WIDTH);
          of_a[d] = _mm256_add_epi16(of_a[d], _mm256_maddubs_epi16(wa, digit));
          of_b[d] = _mm256_add_epi16(of_b[d], _mm256_maddubs_epi16(wb, digit));
          // GCC would load what all steps need first, and have no registers for it.
          asm volatile("" : "+x"(of_a[d]), "+x"(of_b[d])::"memory");
        }
      }
    }
    const int64_t column = start * 8 / BITS;
    const float* scales = x.scales + column / GROUP * DIGITS;
    const __m256 part_a = scaled<DIGITS>(of_a, scales), part_b = scaled<DIGITS>(of_b, scales);
    if (GROUPED) {
      const auto scale = [&](const float* of_groups) {
        return _mm256_permutevar8x32_ps(_mm256_maskload_ps(of_groups + column / x.group, present), group);
      };
      sum_a = _mm256_fmadd_ps(part_a, scale(scales_a), sum_a);
      sum_b = _mm256_fmadd_ps(part_b, scale(scales_b), sum_b);
    } else {
      sum_a = _mm256_add_ps(sum_a, part_a);
      sum_b = _mm256_add_ps(sum_b, part_b);
    }
  }
  sums[0] = sum_of(sum_a);
  sums[1] = sum_of(sum_b);
}

template <int BITS, int DIGITS>
void dot_pairs(const WeightRows& weights, const Digits& x, float* sums) {
  const int64_t bytes = weights.row_bytes;
  for (int64_t c = 0; c < weights.count; c += 2) {
    const uint8_t *a = weights.packed[c], *b = weights.packed[c + 1];
    if (weights.scales)
      dot_two<BITS, DIGITS, true>(a, b, weights.scales[c], weights.scales[c + 1], bytes, x, sums + c);
    else
      dot_two<BITS, DIGITS, false>(a, b, nullptr, nullptr, bytes, x, sums + c);
  }
}

inline __m256 floats(const uint8_t* index, __m256 steps, __m256 lows) {
  const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(index));
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight)), steps, lows);
}

// AddFunction of ROWS rows.
template <int ROWS>
void add_floats(const uint8_t* index, int64_t start, int64_t count, int bits, const float* scales, int64_t group,
                const float* const* x, float* sums) {
  constexpr int SUMS = ROWS == 1 ? 4 : 2;  // of a row, so that additions need not wait for each other
  const float low = static_cast<float>(lowest_code(bits)), step = bits == 1 ? 2.0f : 1.0f;
  __m256 sum[ROWS][SUMS] = {};
  for (int64_t from = 0, some; from < count; from += some) {
    some = group && group < count ? group : count;  // with one scale
    const float scale = group ? scales[(start + from) / group] : 1.0f;
    // Exact but for one rounding: the lowest code is a power of two.
    const __m256 steps = _mm256_set1_ps(scale * step), lows = _mm256_set1_ps(scale * low);
    int64_t k = from;
    for (; k + 32 <= from + some; k += 32)
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        const __m256 weights = floats(index + k + 8 * q, steps, lows);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r)
          sum[r][q % SUMS] = _mm256_fmadd_ps(weights, _mm256_loadu_ps(x[r] + start + k + 8 * q), sum[r][q % SUMS]);
      }
    for (; k < from + some; k += 8)
      for (int r = 0; r < ROWS; ++r)
        sum[r][0] = _mm256_fmadd_ps(floats(index + k, steps, lows), _mm256_loadu_ps(x[r] + start + k), sum[r][0]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
    __m256 all = _mm256_add_ps(sum[r][0], sum[r][1]);
    if (SUMS == 4) all = _mm256_add_ps(all, _mm256_add_ps(sum[r][SUMS - 2], sum[r][SUMS - 1]));
    sums[r] += sum_of(all);
  }
}

}  // namespace

bool split_digits_avx2(const float* x, int bits, const Digits& to) { return split_digits<Lane, WIDTH>(x, bits, to); }

void split_bytes_avx2(const uint8_t* bytes, int zero, int bits, const Digits& to) {
  split_bytes<Lane, WIDTH>(bytes, zero, bits, to);
}

void dot_digits_avx2(const WeightRows& weights, const Digits* x, int64_t rows, float* sums) {
  const int bits = weights.bits;
  const auto of_two = bits == 1 ? dot_pairs<1, 2> : bits == 2 ? dot_pairs<2, 2> : dot_pairs<4, 2>;
  const auto of_three = bits == 1 ? dot_pairs<1, 3> : bits == 2 ? dot_pairs<2, 3> : dot_pairs<4, 3>;
  const auto of_four = bits == 1 ? dot_pairs<1, 4> : bits == 2 ? dot_pairs<2, 4> : dot_pairs<4, 4>;
  const auto dot = x->count == 2 ? of_two : x->count == 3 ? of_three : of_four;
  for (int64_t r = 0; r < rows; ++r) dot(weights, x[r], sums + r * weights.count);
}

void dot_avx2(const uint8_t* packed, int64_t count, int bits, const float* scales, int64_t group,
              const float* const* x, int64_t rows, float* sums) {
  add_up(add_floats<1>, add_floats<2>, add_floats<4>, packed, count, bits, scales, group, x, rows, sums);
}

}  // namespace bitorch_engine
