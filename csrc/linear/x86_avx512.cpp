#include <immintrin.h>

#include <cstring>

#include "linear/digits.h"
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
    const __m512i at_1 = place ? _mm512_srli_epi16(bytes, static_cast<unsigned>(place - 1)) : _mm512_add_epi8(bytes, bytes);
    return _mm512_and_si512(at_1, _mm512_set1_epi8(2));
  }
  const __m512i shifted = _mm512_srli_epi16(bytes, static_cast<unsigned>(place * BITS));
  return _mm512_and_si512(shifted, _mm512_set1_epi8((1 << BITS) - 1));
}

// A group of a row of activations.
struct Piece {
  const int8_t* digits;
  const uint8_t* corrections;
  const float* scales;
};

// A group of CHANNELS rows of weights, of which `left` bytes are there, times those of ROWS of activations, to 16 partial
// sums each; those of the next row of activations lie `stride` behind. The accumulators of four channels and two rows
// fill the registers: they stay there only in a function that is nothing but this loop, and if bytes that were loaded for
// one place are not kept for the next.
template <int BITS, int DIGITS, int ROWS>
__attribute__((noinline)) void add_group(const uint8_t* const* weights, int64_t start, int64_t left, const Piece* x,
                                         float* sums, int64_t stride) {
  __m512i total[ROWS][DIGITS][CHANNELS];
#pragma GCC unroll 2
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 3
    for (int d = 0; d < DIGITS; ++d)
#pragma GCC unroll 4
      for (int c = 0; c < CHANNELS; ++c) total[r][d][c] = _mm512_loadu_si512(x[r].corrections + d * WIDEST);
  const uint8_t *w0 = weights[0] + start, *w1 = weights[1] + start, *w2 = weights[2] + start, *w3 = weights[3] + start;
  const int8_t *x0 = x[0].digits, *x1 = x[ROWS - 1].digits;
#pragma GCC unroll 4
  for (int64_t place = 0; place < GROUP * BITS / 8; place += WIDTH) {
    const int64_t rest = left - place;  // what follows is another row, or not there
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
#pragma GCC unroll 3
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
      float* parts = sums + r * stride + 16 * c;
      __m512 sum = _mm512_load_ps(parts);
#pragma GCC unroll 3
      for (int d = 0; d < DIGITS; ++d)
        sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total[r][d][c]), _mm512_set1_ps(x[r].scales[d]), sum);
      _mm512_store_ps(parts, sum);
    }
}

// A group of all channels and rows after the other: what is read again is near then.
template <int BITS, int DIGITS>
void dot_groups(const uint8_t* const* weights, int64_t channels, int64_t row_bytes, const Digits* x, int64_t rows,
                float* sums) {
  constexpr int64_t BYTES = GROUP * BITS / 8;
  alignas(64) float parts[MOST_ROWS * MOST_CHANNELS * 16];
  std::memset(parts, 0, rows * channels * 16 * sizeof(float));
  for (int64_t start = 0, g = 0; start < row_bytes; start += BYTES, ++g) {
    Piece pieces[MOST_ROWS];
    for (int64_t r = 0; r < rows; ++r)
      pieces[r] = {x[r].digits + DIGITS * GROUP * g, x[r].corrections + 3 * g * WIDEST, x[r].scales + 3 * g};
    for (int64_t c = 0; c < channels; c += CHANNELS)
      for (int64_t r = 0; r < rows; r += 2) {
        const auto add = r + 1 < rows ? add_group<BITS, DIGITS, 2> : add_group<BITS, DIGITS, 1>;
        add(weights + c, start, row_bytes - start, pieces + r, parts + 16 * (r * channels + c), 16 * channels);
      }
  }
  for (int64_t i = 0; i < rows * channels; ++i) sums[i] = _mm512_reduce_add_ps(_mm512_load_ps(parts + 16 * i));
}

}  // namespace

bool split_digits_avx512(const float* x, int bits, const Digits& to) { return split_digits<int32_t, WIDTH>(x, bits, to); }

void split_bytes_avx512(const uint8_t* bytes, int zero, int bits, const Digits& to) {
  split_bytes<int32_t, WIDTH>(bytes, zero, bits, to);
}

void dot_digits_avx512(const uint8_t* const* weights, int64_t channels, int64_t row_bytes, int bits, const Digits* x,
                       int64_t rows, float* sums) {
  const auto two = bits == 1 ? dot_groups<1, 2> : bits == 2 ? dot_groups<2, 2> : dot_groups<4, 2>;
  const auto three = bits == 1 ? dot_groups<1, 3> : bits == 2 ? dot_groups<2, 3> : dot_groups<4, 3>;
  (x->count == 2 ? two : three)(weights, channels, row_bytes, x, rows, sums);
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
