#include <immintrin.h>

#include "bits/bits.h"
#include "qconv/product.h"
#include "qconv/qconv.h"

namespace bitorch_engine {
namespace {

// MR pixels times half a block of channels. vpmaddubsw adds two products in 16 bits and saturates. PAIRS such sums fit
// together: so many steps are added there before they are widened, which saves two operations of three. Where not one
// fits, PAIRS is 0, and each weight is taken as 2 * half + bit.
template <int MR, int PAIRS>
void tile(const Tile& t, int64_t first, const int8_t* weights, int32_t* totals) {
  constexpr int STEPS = PAIRS > 0 ? PAIRS : 1;
  const __m256i one = _mm256_set1_epi16(1);
  __m256i acc[MR];
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) acc[m] = _mm256_setzero_si256();
  for (int64_t tap = 0; tap < t.taps; ++tap) {
    const uint8_t* pixel[MR];
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) pixel[m] = t.rows[first + m] + t.offsets[tap];
    for (int64_t k = 0; k < t.tap_depth; k += 4 * STEPS, weights += 64 * STEPS) {
      __m256i sum[MR];
#pragma GCC unroll 4
      for (int g = 0; g < STEPS; ++g) {
        const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights + 64 * g));
        const __m256i flipped = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
        const __m256i shifted = _mm256_and_si256(_mm256_srli_epi16(flipped, 1), _mm256_set1_epi8(127));
        const __m256i half = _mm256_sub_epi8(shifted, _mm256_set1_epi8(64));
        const __m256i bit = _mm256_and_si256(w, _mm256_set1_epi8(1));
#pragma GCC unroll 4
        for (int m = 0; m < MR; ++m) {
          int four;
          __builtin_memcpy(&four, pixel[m] + k + 4 * g, 4);
          const __m256i x = _mm256_set1_epi32(four);
          if (PAIRS > 0) {
            const __m256i two = _mm256_maddubs_epi16(x, w);
            sum[m] = g ? _mm256_add_epi16(sum[m], two) : two;
          } else {
            const __m256i halves = _mm256_madd_epi16(_mm256_maddubs_epi16(x, half), _mm256_set1_epi16(2));
            sum[m] = _mm256_add_epi32(halves, _mm256_madd_epi16(_mm256_maddubs_epi16(x, bit), one));
          }
        }
      }
#pragma GCC unroll 4
      for (int m = 0; m < MR; ++m)
        acc[m] = _mm256_add_epi32(acc[m], PAIRS > 0 ? _mm256_madd_epi16(sum[m], one) : sum[m]);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(totals + (first + m) * COLUMNS), acc[m]);
}

using TileFunction = void (*)(const Tile&, int64_t, const int8_t*, int32_t*);
template <int PAIRS>
constexpr TileFunction TILES[3] = {tile<1, PAIRS>, tile<2, PAIRS>, tile<3, PAIRS>};

const TileFunction* tiles_for(const Tile& t) {
  if (t.pairs >= 4 && t.tap_depth % 16 == 0) return TILES<4>;
  if (t.pairs >= 2 && t.tap_depth % 8 == 0) return TILES<2>;
  return t.pairs >= 1 ? TILES<1> : TILES<0>;
}

}  // namespace

void multiply_avx2(const Tile& t) {
  const TileFunction* tiles = tiles_for(t);
  for (int64_t b = 0; b < t.blocks; ++b)
    for (int64_t i = 0; i < t.count; i += 3)
      for (int64_t half = 0; half < 2; ++half)
        tiles[(t.count - i < 3 ? t.count - i : 3) - 1](t, i, t.weights + b * t.block_bytes + 32 * half,
                                                       t.totals + b * BLOCK + 8 * half);
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
