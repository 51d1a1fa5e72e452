#include <immintrin.h>

#include "linear/digits.h"
#include "linear/floats.h"
#include "linear/linear.h"
#include "qconv/qconv.h"

namespace bitorch_engine {
namespace {

constexpr int64_t WIDTH = 32;
constexpr int64_t AHEAD = 1024;  // bytes of a row that are asked for before they are needed
constexpr int TILE = 2;           // rows of weights whose sums, and what they need, have registers

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

// A piece of TILE rows of weights, `bytes` of each, which zeros fill up to whole vectors: products of codes and digits
// are added to sums that begin with the corrections, and these become floats.
template <int BITS, int DIGITS>
__attribute__((always_inline)) inline void multiply_piece(const uint8_t* const* weights, int64_t bytes,
                                                          const int8_t* digits, const uint8_t* corrections,
                                                          const float* scales, __m256* parts) {
  __m256i sums[TILE][DIGITS];
#pragma GCC unroll 2
  for (int c = 0; c < TILE; ++c)
#pragma GCC unroll 4
    for (int d = 0; d < DIGITS; ++d) sums[c][d] = load(corrections + d * WIDTH);
#pragma GCC unroll 1
  for (int64_t i = 0; i < bytes; i += WIDTH) {
#pragma GCC unroll 8
    for (int j = 0; j < 8 / BITS; ++j, digits += DIGITS * WIDTH) {
      __m256i digit[DIGITS];
#pragma GCC unroll 4
      for (int d = 0; d < DIGITS; ++d) digit[d] = load(digits + d * WIDTH);
#pragma GCC unroll 2
      for (int c = 0; c < TILE; ++c) {
        const __m256i value = values<BITS>(load(weights[c] + i), j);
#pragma GCC unroll 4
        for (int d = 0; d < DIGITS; ++d) {
          sums[c][d] = _mm256_add_epi16(sums[c][d], _mm256_maddubs_epi16(value, digit[d]));
          // GCC would first add products to each other, and have no registers for all of them.
          asm("" : "+x"(sums[c][d]));
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int c = 0; c < TILE; ++c) {
    parts[c] = _mm256_setzero_ps();
#pragma GCC unroll 4
    for (int d = 0; d < DIGITS; ++d) {
      const __m256i fours = _mm256_madd_epi16(sums[c][d], _mm256_set1_epi16(1));
      parts[c] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(fours), _mm256_set1_ps(scales[d]), parts[c]);
    }
  }
}

// CHANNELS rows of weights. GROUPED: whether they have scales.
template <int BITS, int DIGITS, bool GROUPED>
void multiply_rows(const uint8_t* const* weights, const float* const* weight_scales, int64_t row_bytes,
                   const Digits& x, float* sums) {
  const int64_t piece = GROUPED ? piece_columns(x.group, BITS, WIDTH) : GROUP, piece_bytes = piece * BITS / 8;
  // Groups of a piece, which are several where a vector has more columns than a group, and that of each lane.
  const int groups = GROUPED && x.group < piece ? static_cast<int>(piece / x.group) : 1;
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i group = _mm256_srli_epi32(_mm256_mullo_epi32(lanes, _mm256_set1_epi32(groups)), 3);
  __m256i present = _mm256_cmpgt_epi32(_mm256_set1_epi32(groups), lanes);
  __m256 totals[CHANNELS];
#pragma GCC unroll 4
  for (int c = 0; c < CHANNELS; ++c) totals[c] = _mm256_setzero_ps();
  const int8_t* digits = x.digits;
  const uint8_t* corrections = x.corrections;
  uint8_t last[CHANNELS][GROUP * BITS / 8];
  for (int64_t start = 0; start < row_bytes; start += piece_bytes) {
    const uint8_t* from[CHANNELS];
#pragma GCC unroll 4
    for (int c = 0; c < CHANNELS; ++c) from[c] = weights[c] + start;
#pragma GCC unroll 4
    for (int c = 0; c < CHANNELS; ++c)
      for (int64_t line = start % 64; line < piece_bytes; line += 64) __builtin_prefetch(from[c] + line + AHEAD, 0, 2);
    const int64_t left = row_bytes - start;
    if (left < piece_bytes && left % WIDTH) {  // what follows is another row, or not there
      __builtin_memset(last, 0, sizeof last);
      for (int c = 0; c < CHANNELS; ++c) {
        __builtin_memcpy(last[c], from[c], left);
        from[c] = last[c];
      }
      if (groups > 1)
        present = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(left * 8 / BITS / x.group)), lanes);
    }
    const int64_t column = start * 8 / BITS;
    const float* scales = x.scales + column / GROUP * DIGITS;
    __m256 parts[CHANNELS];
#pragma GCC unroll 2
    for (int c = 0; c < CHANNELS; c += TILE) {
      // Where the compiler knows how long a piece is, it takes a third less time.
      if (left < piece_bytes)
        multiply_piece<BITS, DIGITS>(from + c, left, digits, corrections, scales, parts + c);
      else
        multiply_piece<BITS, DIGITS>(from + c, piece_bytes, digits, corrections, scales, parts + c);
    }
#pragma GCC unroll 4
    for (int c = 0; c < CHANNELS; ++c) {
      if (GROUPED) {
        const __m256 some = _mm256_maskload_ps(weight_scales[c] + column / x.group, present);
        totals[c] = _mm256_fmadd_ps(parts[c], _mm256_permutevar8x32_ps(some, group), totals[c]);
      } else {
        totals[c] = _mm256_add_ps(totals[c], parts[c]);
      }
    }
    digits += piece * DIGITS;
    corrections += DIGITS * WIDTH;
  }
#pragma GCC unroll 4
  for (int c = 0; c < CHANNELS; ++c) sums[c] = sum_of(totals[c]);
}

template <int BITS, int DIGITS>
void multiply_fours(const WeightRows& weights, const Digits& x, float* sums) {
  for (int64_t c = 0; c < weights.count; c += CHANNELS) {
    if (weights.scales)
      multiply_rows<BITS, DIGITS, true>(weights.packed + c, weights.scales + c, weights.row_bytes, x, sums + c);
    else
      multiply_rows<BITS, DIGITS, false>(weights.packed + c, nullptr, weights.row_bytes, x, sums + c);
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

bool split_bytes_avx2(const uint8_t* bytes, int zero, int bits, const Digits& to) {
  return split_bytes<Lane, WIDTH>(bytes, zero, bits, to);
}

void dot_digits_avx2(const WeightRows& weights, const Digits* x, int64_t rows, float* sums) {
  const int bits = weights.bits;
  const auto one = bits == 1 ? multiply_fours<1, 1> : bits == 2 ? multiply_fours<2, 1> : multiply_fours<4, 1>;
  const auto two = bits == 1 ? multiply_fours<1, 2> : bits == 2 ? multiply_fours<2, 2> : multiply_fours<4, 2>;
  const auto three = bits == 1 ? multiply_fours<1, 3> : bits == 2 ? multiply_fours<2, 3> : multiply_fours<4, 3>;
  const auto four = bits == 1 ? multiply_fours<1, 4> : bits == 2 ? multiply_fours<2, 4> : multiply_fours<4, 4>;
  const auto dot = x->count == 1 ? one : x->count == 2 ? two : x->count == 3 ? three : four;
  for (int64_t r = 0; r < rows; ++r) dot(weights, x[r], sums + r * weights.count);
}

void dot_avx2(const uint8_t* packed, int64_t count, int bits, const float* scales, int64_t group,
              const float* const* x, int64_t rows, float* sums) {
  add_up(add_floats<1>, add_floats<2>, add_floats<4>, packed, count, bits, scales, group, x, rows, sums);
}

}  // namespace bitorch_engine
