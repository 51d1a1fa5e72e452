#include <immintrin.h>

#include "bits/bits.h"
#include "qconv/product.h"
#include "qconv/qconv.h"

namespace bitorch_engine {
namespace {

// MR pixels times one block of 16 channels. vpmaddubsw adds two products in 16 bits and saturates: where they may not
// fit, each weight is taken as 2 * half + bit.
template <int MR, bool wide>
void tile(const Tile& t, int64_t first, int64_t block) {
  const __m256i one = _mm256_set1_epi16(1);
  __m256i acc[MR][2];
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) acc[m][0] = acc[m][1] = _mm256_setzero_si256();
  const int8_t* weights = t.weights + block * t.block_bytes;
  for (int64_t tap = 0; tap < t.taps; ++tap) {
    const uint8_t* pixel[MR];
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) pixel[m] = t.rows[first + m] + t.offsets[tap];
    for (int64_t k = 0; k < t.tap_depth; k += 4, weights += 64) {
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights + 32 * j));
        __m256i half, bit;
        if (wide) {
          const __m256i shifted = _mm256_and_si256(_mm256_srli_epi16(_mm256_xor_si256(w, _mm256_set1_epi8(-128)), 1),
                                                   _mm256_set1_epi8(127));
          half = _mm256_sub_epi8(shifted, _mm256_set1_epi8(64));
          bit = _mm256_and_si256(w, _mm256_set1_epi8(1));
        }
#pragma GCC unroll 4
        for (int m = 0; m < MR; ++m) {
          int four;
          __builtin_memcpy(&four, pixel[m] + k, 4);
          const __m256i x = _mm256_set1_epi32(four);
          if (wide) {
            const __m256i halves = _mm256_madd_epi16(_mm256_maddubs_epi16(x, half), _mm256_set1_epi16(2));
            const __m256i bits = _mm256_madd_epi16(_mm256_maddubs_epi16(x, bit), one);
            acc[m][j] = _mm256_add_epi32(acc[m][j], _mm256_add_epi32(halves, bits));
          } else {
            acc[m][j] = _mm256_add_epi32(acc[m][j], _mm256_madd_epi16(_mm256_maddubs_epi16(x, w), one));
          }
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      int32_t* to = t.totals + (first + m) * COLUMNS + block * BLOCK + 8 * j;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), acc[m][j]);
    }
}

using TileFunction = void (*)(const Tile&, int64_t, int64_t);
constexpr TileFunction TILES[2][4] = {{tile<1, false>, tile<2, false>, tile<3, false>, tile<4, false>},
                                      {tile<1, true>, tile<2, true>, tile<3, true>, tile<4, true>}};

}  // namespace

void multiply_avx2(const Tile& t) {
  for (int64_t b = 0; b < t.blocks; ++b)
    for (int64_t i = 0; i < t.count; i += 4) TILES[t.wide][(t.count - i < 4 ? t.count - i : 4) - 1](t, i, b);
}

void decode_avx2(const uint8_t* packed, int64_t count, int bits, int8_t* codes) {
  unpack_kernel.pick()(packed, reinterpret_cast<uint8_t*>(codes), count, bits);
  const __m256i low = _mm256_set1_epi8(static_cast<char>(lowest_code(bits)));
  for (int64_t i = 0; i < count; i += 32) {
    __m256i* place = reinterpret_cast<__m256i*>(codes + i);
    __m256i index = _mm256_loadu_si256(place);
    if (bits == 1) index = _mm256_add_epi8(index, index);
    _mm256_storeu_si256(place, _mm256_add_epi8(index, low));
  }
}

void finish_avx2(const int32_t* totals, int64_t count, int64_t channels, const Epilogue& e, void* const* out,
                 int64_t channel_stride) {
  const int64_t whole = channel_stride == 1 && e.dtype == FLOAT32 && !e.bytes ? channels & ~int64_t{7} : 0;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t o = 0; o < whole; o += 8) {
      const __m256i total = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(totals + i * COLUMNS + o));
      const __m256i zero = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(e.zero_sum + o));
      __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(total, zero)), _mm256_loadu_ps(e.factor + o));
      if (e.sample_factor) value = _mm256_mul_ps(value, _mm256_set1_ps(e.sample_factor[i]));
      if (e.bias) value = _mm256_add_ps(value, _mm256_loadu_ps(e.bias + o));
      _mm256_storeu_ps(static_cast<float*>(out[i]) + o, _mm256_add_ps(value, _mm256_set1_ps(e.poison)));
    }
  if (whole == channels) return;
  Epilogue rest = e;
  rest.zero_sum += whole;
  rest.factor += whole;
  if (e.bias) rest.bias += whole;
  void* places[ROWS];
  for (int64_t i = 0; i < count; ++i) places[i] = static_cast<float*>(out[i]) + whole;
  finish_scalar(totals + whole, count, channels - whole, rest, whole ? places : out, channel_stride);
}

}  // namespace bitorch_engine
