#include <immintrin.h>

#include <cstring>

#include "linear/digits.h"
#include "linear/floats.h"
#include "linear/linear.h"
#include "qconv/qconv.h"

namespace bitorch_engine {
namespace {

constexpr int64_t WIDTH = 64;
constexpr int64_t AHEAD = 4096;  // bytes of a row, and of those behind it, that are asked for before they are needed

// Value `place` of each byte; of 1 bit, twice that.
template <int BITS>
inline __m512i values(__m512i bytes, int place) {
  if (BITS == 1) {
    const __m512i at_1 =
        place ? _mm512_srli_epi16(bytes, static_cast<unsigned>(place - 1)) : _mm512_add_epi8(bytes, bytes);
    return _mm512_and_si512(at_1, _mm512_set1_epi8(2));
  }
  const __m512i shifted = _mm512_srli_epi16(bytes, static_cast<unsigned>(place * BITS));
  return _mm512_and_si512(shifted, _mm512_set1_epi8((1 << BITS) - 1));
}

// A piece of a row of activations.
struct Piece {
  const int8_t* digits;
  const uint8_t* corrections;
  const float* scales;
};

// The groups of a piece: the first, how many there are, and which of them a lane has.
struct Groups {
  int64_t first;
  __mmask16 present;
  __m512i of_lane;
};

// A piece of CHANNELS rows of weights, which is `bytes` long, times those of ROWS of activations, to 16 partial sums
// each; those of the next row of activations lie `stride` behind. The accumulators of four channels and two rows fill
// the registers: they stay there only in a function that is nothing but this loop, and if bytes that were loaded for
// one place are not kept for the next. scales: of the rows' groups, or null.
template <int BITS, int DIGITS, int ROWS>
__attribute__((noinline)) void add_piece(const uint8_t* const* weights, const float* const* scales,
                                         const Groups& groups, int64_t start, int64_t bytes, const Piece* x,
                                         float* sums, int64_t stride) {
  __m512i total[ROWS][DIGITS][CHANNELS];
#pragma GCC unroll 2
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int d = 0; d < DIGITS; ++d)
#pragma GCC unroll 4
      for (int c = 0; c < CHANNELS; ++c) total[r][d][c] = _mm512_loadu_si512(x[r].corrections + d * WIDTH);
  const uint8_t *w0 = weights[0] + start, *w1 = weights[1] + start, *w2 = weights[2] + start, *w3 = weights[3] + start;
  const int8_t *x0 = x[0].digits, *x1 = x[ROWS - 1].digits;
#pragma GCC unroll 4
  for (int64_t place = 0; place < GROUP * BITS / 8; place += WIDTH) {
    const int64_t rest = bytes - place;  // what follows is another piece or row, or not there
    if (rest <= 0) break;
    const __mmask64 mask = rest >= WIDTH ? ~uint64_t{0} : (uint64_t{1} << rest) - 1;
    __builtin_prefetch(w0 + place + AHEAD, 0, 2);
    __builtin_prefetch(w1 + place + AHEAD, 0, 2);
    __builtin_prefetch(w2 + place + AHEAD, 0, 2);
    __builtin_prefetch(w3 + place + AHEAD, 0, 2);
#pragma GCC unroll 8
    for (int j = 0; j < 8 / BITS; ++j, x0 += DIGITS * WIDTH, x1 += DIGITS * WIDTH) {
      const __m512i w[CHANNELS] = {values<BITS>(_mm512_maskz_loadu_epi8(mask, w0 + place), j),
                                   values<BITS>(_mm512_maskz_loadu_epi8(mask, w1 + place), j),
                                   values<BITS>(_mm512_maskz_loadu_epi8(mask, w2 + place), j),
                                   values<BITS>(_mm512_maskz_loadu_epi8(mask, w3 + place), j)};
#pragma GCC unroll 2
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int d = 0; d < DIGITS; ++d) {
          const __m512i digits = _mm512_loadu_si512((r ? x1 : x0) + WIDTH * d);
#pragma GCC unroll 4
          for (int c = 0; c < CHANNELS; ++c) total[r][d][c] = _mm512_dpbusd_epi32(total[r][d][c], w[c], digits);
        }
      asm volatile("" ::: "memory");
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < CHANNELS; ++c) {
      __m512 factor[DIGITS];
#pragma GCC unroll 4
      for (int d = 0; d < DIGITS; ++d) factor[d] = _mm512_set1_ps(x[r].scales[d]);
      float* parts = sums + r * stride + 16 * c;
      __m512 sum = _mm512_load_ps(parts);
      if (scales) {
        const __m512 some = _mm512_maskz_loadu_ps(groups.present, scales[c] + groups.first);
        const __m512 scale = _mm512_permutexvar_ps(groups.of_lane, some);
#pragma GCC unroll 4
        for (int d = 0; d < DIGITS; ++d) factor[d] = _mm512_mul_ps(factor[d], scale);
      }
#pragma GCC unroll 4
      for (int d = 0; d < DIGITS; ++d) sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total[r][d][c]), factor[d], sum);
      _mm512_store_ps(parts, sum);
    }
}

// A piece of all channels and rows after the other: what is read again is near then.
template <int BITS, int DIGITS>
void dot_pieces(const WeightRows& weights, const Digits* x, int64_t rows, float* sums) {
  constexpr int TILE = DIGITS < 4 ? 2 : 1;  // rows whose accumulators fit the registers
  alignas(64) float parts[MOST_ROWS * MOST_CHANNELS * 16];
  std::memset(parts, 0, rows * weights.count * 16 * sizeof(float));
  const int64_t group = x->group, piece = piece_columns(group, BITS, WIDTH), columns = weights.row_bytes * 8 / BITS;
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t column = 0, p = 0; column < columns; column += piece, ++p) {
    const int64_t count = columns - column < piece ? columns - column : piece;
    const bool many = group && group < piece;
    const Groups groups{group ? column / group : 0, static_cast<__mmask16>(many ? (1 << count / group) - 1 : 1),
                        _mm512_srli_epi32(_mm512_mullo_epi32(lanes, _mm512_set1_epi32(many ? piece / group : 1)), 4)};
    Piece pieces[MOST_ROWS];
    for (int64_t r = 0; r < rows; ++r)
      pieces[r] = {x[r].digits + DIGITS * column, x[r].corrections + p * DIGITS * WIDTH,
                   x[r].scales + column / GROUP * DIGITS};
    for (int64_t c = 0; c < weights.count; c += CHANNELS)
      for (int64_t r = 0; r < rows; r += TILE) {
        const auto add = r + TILE <= rows ? add_piece<BITS, DIGITS, TILE> : add_piece<BITS, DIGITS, 1>;
        add(weights.packed + c, weights.scales ? weights.scales + c : nullptr, groups, column * BITS / 8,
            count * BITS / 8, pieces + r, parts + 16 * (r * weights.count + c), 16 * weights.count);
      }
  }
  for (int64_t i = 0; i < rows * weights.count; ++i) sums[i] = _mm512_reduce_add_ps(_mm512_load_ps(parts + 16 * i));
}

inline __m512 floats(__m128i index, __m512 steps, __m512 lows) {
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(index)), steps, lows);
}

// AddFunction of ROWS rows.
template <int ROWS>
void add_floats(const uint8_t* index, int64_t start, int64_t count, int bits, const float* scales, int64_t group,
                const float* const* x, float* sums) {
  constexpr int SUMS = ROWS == 1 ? 4 : 2;  // of a row, so that additions need not wait for each other
  const float low = static_cast<float>(lowest_code(bits)), step = bits == 1 ? 2.0f : 1.0f;
  __m512 sum[ROWS][SUMS] = {};
  for (int64_t from = 0, some; from < count; from += some) {
    some = group && group < count ? group : count;  // with one scale
    const float scale = group ? scales[(start + from) / group] : 1.0f;
    // Exact but for one rounding: the lowest code is a power of two.
    const __m512 steps = _mm512_set1_ps(scale * step), lows = _mm512_set1_ps(scale * low);
    int64_t k = from;
    for (; k + 64 <= from + some; k += 64)
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        const auto* bytes = reinterpret_cast<const __m128i*>(index + k + 16 * q);
        const __m512 weights = floats(_mm_loadu_si128(bytes), steps, lows);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r)
          sum[r][q % SUMS] = _mm512_fmadd_ps(weights, _mm512_loadu_ps(x[r] + start + k + 16 * q), sum[r][q % SUMS]);
      }
    for (; k < from + some; k += 16) {
      const int64_t left = from + some - k;
      const __mmask16 mask = static_cast<__mmask16>(left < 16 ? (1 << left) - 1 : 0xffff);
      const __m512 weights = floats(_mm_maskz_loadu_epi8(mask, index + k), steps, lows);
      for (int r = 0; r < ROWS; ++r)
        sum[r][0] = _mm512_fmadd_ps(weights, _mm512_maskz_loadu_ps(mask, x[r] + start + k), sum[r][0]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
    __m512 all = _mm512_add_ps(sum[r][0], sum[r][1]);
    if (SUMS == 4) all = _mm512_add_ps(all, _mm512_add_ps(sum[r][SUMS - 2], sum[r][SUMS - 1]));
    sums[r] += _mm512_reduce_add_ps(all);
  }
}

}  // namespace

bool split_digits_avx512(const float* x, int bits, const Digits& to) {
  return split_digits<int32_t, WIDTH>(x, bits, to);
}

bool split_bytes_avx512(const uint8_t* bytes, int zero, int bits, const Digits& to) {
  return split_bytes<int32_t, WIDTH>(bytes, zero, bits, to);
}

void dot_digits_avx512(const WeightRows& weights, const Digits* x, int64_t rows, float* sums) {
  const int bits = weights.bits;
  const auto one = bits == 1 ? dot_pieces<1, 1> : bits == 2 ? dot_pieces<2, 1> : dot_pieces<4, 1>;
  const auto two = bits == 1 ? dot_pieces<1, 2> : bits == 2 ? dot_pieces<2, 2> : dot_pieces<4, 2>;
  const auto three = bits == 1 ? dot_pieces<1, 3> : bits == 2 ? dot_pieces<2, 3> : dot_pieces<4, 3>;
  const auto four = bits == 1 ? dot_pieces<1, 4> : bits == 2 ? dot_pieces<2, 4> : dot_pieces<4, 4>;
  (x->count == 1 ? one : x->count == 2 ? two : x->count == 3 ? three : four)(weights, x, rows, sums);
}

void dot_avx512(const WeightRows& weights, int64_t columns, int64_t group, const float* const* x, int64_t rows,
                float* sums) {
  add_up(add_floats<1>, add_floats<2>, add_floats<4>, weights, columns, group, x, rows, sums);
}

}  // namespace bitorch_engine
