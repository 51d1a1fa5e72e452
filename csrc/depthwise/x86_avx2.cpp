#include <immintrin.h>

#include "depthwise/depthwise.h"

namespace bitorch_engine {
namespace {

inline __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

// GCC 12 sends what it loads and uses twice through the stack, unless it is told not to.
inline __m256i in_register(__m256i x) {
  asm("" : "+x"(x));
  return x;
}

template <int WHICH>
inline __m128i half(__m256i x) {
  return WHICH ? _mm256_extracti128_si256(x, 1) : _mm256_castsi256_si128(x);
}

// What a block of lanes has beside its pixels; apart from the line, so that stores of results do not make it be read
// again.
struct Block {
  const uint8_t* base;
  const int64_t* offsets;
  int64_t pairs, step, fit;
  const int8_t* weights;
  const int32_t* start;
  const float *factor, *bias;
};

template <bool BIAS>
inline void store_total(const Block& b, int lane, __m256i total, float* out) {
  const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(total), _mm256_loadu_ps(b.factor + lane));
  _mm256_storeu_ps(out + lane, BIAS ? _mm256_add_ps(scaled, _mm256_loadu_ps(b.bias + lane)) : scaled);
}

inline void store(const Block& b, int lane, __m256i sum, float* out) {
  const __m256i total = _mm256_add_epi32(sum, load(b.start + lane));
  b.bias ? store_total<true>(b, lane, total, out) : store_total<false>(b, lane, total, out);
}

// 16 bits each: of lanes 0-7 and 16-23, and of 8-15 and 24-31, as interleaving two vectors of bytes gives them.
template <bool BIAS>
inline void store_totals(const Block& b, __m256i first, __m256i second, float* out) {
  store_total<BIAS>(b, 0, _mm256_cvtepi16_epi32(half<0>(first)), out);
  store_total<BIAS>(b, 8, _mm256_cvtepi16_epi32(half<0>(second)), out);
  store_total<BIAS>(b, 16, _mm256_cvtepi16_epi32(half<1>(first)), out);
  store_total<BIAS>(b, 24, _mm256_cvtepi16_epi32(half<1>(second)), out);
}

// What sums of lanes lane .. lane + 7 and lane + 16 .. lane + 23 start with, in that order.
inline __m256i start_of(const Block& b, int lane) {
  const __m256i both = _mm256_packs_epi32(load(b.start + lane), load(b.start + lane + 16));
  return _mm256_permute4x64_epi64(both, 0xd8);
}

// `pixels` pixels of 32 lanes.
using BlockFunction = void (*)(Block b, int64_t pixels, float* out, int64_t pitch);

// All sums of a lane fit 16 bits. Two pixels at a time share the weights, which do not fit the registers with all else.
template <int PAIRS, bool BIAS>
void few(Block b, int64_t pixels, float* out, int64_t pitch) {
  const uint8_t* at[2 * PAIRS];
#pragma GCC unroll 10
  for (int k = 0; k < 2 * PAIRS; ++k) at[k] = b.base + b.offsets[k];
  const __m256i first = start_of(b, 0), second = start_of(b, 8);
  for (int64_t x = 0; x < pixels; x += 2) {
    // Of an odd number, the last one is its own partner.
    const int64_t here = x * b.step, next = x + 1 < pixels ? here + b.step : here;
    __m256i p = first, q = second, r = first, s = second;
#pragma GCC unroll 5
    for (int k = 0; k < PAIRS; ++k) {
      const __m256i w = load(b.weights + 64 * k), v = load(b.weights + 64 * k + 32);
      const __m256i c = in_register(load(at[2 * k] + here)), d = in_register(load(at[2 * k + 1] + here));
      p = _mm256_add_epi16(p, _mm256_maddubs_epi16(_mm256_unpacklo_epi8(c, d), w));
      q = _mm256_add_epi16(q, _mm256_maddubs_epi16(_mm256_unpackhi_epi8(c, d), v));
      const __m256i e = in_register(load(at[2 * k] + next)), f = in_register(load(at[2 * k + 1] + next));
      r = _mm256_add_epi16(r, _mm256_maddubs_epi16(_mm256_unpacklo_epi8(e, f), w));
      s = _mm256_add_epi16(s, _mm256_maddubs_epi16(_mm256_unpackhi_epi8(e, f), v));
      asm volatile("" : "+x"(p), "+x"(q), "+x"(r), "+x"(s)::"memory");  // no loads for later steps yet
    }
    store_totals<BIAS>(b, p, q, out + x * pitch);
    if (next != here) store_totals<BIAS>(b, r, s, out + (x + 1) * pitch);
  }
}

// Any number of products: `fit` pairs are added in 16 bits before they are widened.
void many(Block b, int64_t pixels, float* out, int64_t pitch) {
  for (int64_t x = 0; x < pixels; ++x, b.base += b.step, out += pitch) {
    __m256i p = _mm256_setzero_si256(), q = p, r = p, s = p;
    for (int64_t k = 0; k < b.pairs;) {
      const int64_t end = b.pairs - k < b.fit ? b.pairs : k + b.fit;
      __m256i first = _mm256_setzero_si256(), second = first;
      for (; k < end; ++k) {
        const __m256i c = load(b.base + b.offsets[2 * k]), d = load(b.base + b.offsets[2 * k + 1]);
        const __m256i e = _mm256_unpacklo_epi8(c, d), f = _mm256_unpackhi_epi8(c, d);
        first = _mm256_add_epi16(first, _mm256_maddubs_epi16(e, load(b.weights + 64 * k)));
        second = _mm256_add_epi16(second, _mm256_maddubs_epi16(f, load(b.weights + 64 * k + 32)));
      }
      p = _mm256_add_epi32(p, _mm256_cvtepi16_epi32(half<0>(first)));
      q = _mm256_add_epi32(q, _mm256_cvtepi16_epi32(half<0>(second)));
      r = _mm256_add_epi32(r, _mm256_cvtepi16_epi32(half<1>(first)));
      s = _mm256_add_epi32(s, _mm256_cvtepi16_epi32(half<1>(second)));
    }
    store(b, 0, p, out);
    store(b, 8, q, out);
    store(b, 16, r, out);
    store(b, 24, s, out);
  }
}

inline __m256i widened_product(__m128i pixels, const int8_t* weights) {
  const __m128i w = _mm_loadu_si128(reinterpret_cast<const __m128i*>(weights));
  return _mm256_madd_epi16(_mm256_cvtepu8_epi16(pixels), _mm256_cvtepi8_epi16(w));
}

// Not even two products fit 16 bits (8-bit weights and activations): both are widened first.
void wide(Block b, int64_t pixels, float* out, int64_t pitch) {
  for (int64_t x = 0; x < pixels; ++x, b.base += b.step, out += pitch) {
    __m256i p = _mm256_setzero_si256(), q = p, r = p, s = p;
    for (int64_t k = 0; k < b.pairs; ++k) {
      const int8_t* w = b.weights + 64 * k;
      const __m256i c = load(b.base + b.offsets[2 * k]), d = load(b.base + b.offsets[2 * k + 1]);
      const __m256i e = _mm256_unpacklo_epi8(c, d), f = _mm256_unpackhi_epi8(c, d);
      p = _mm256_add_epi32(p, widened_product(half<0>(e), w));
      r = _mm256_add_epi32(r, widened_product(half<1>(e), w + 16));
      q = _mm256_add_epi32(q, widened_product(half<0>(f), w + 32));
      s = _mm256_add_epi32(s, widened_product(half<1>(f), w + 48));
    }
    store(b, 0, p, out);
    store(b, 8, q, out);
    store(b, 16, r, out);
    store(b, 24, s, out);
  }
}

// Two pixels of eight lanes beside each other, in 16 bits.
inline __m256i load_two(const uint8_t* a, const uint8_t* b) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a));
  return _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(x, _mm_loadu_si128(reinterpret_cast<const __m128i*>(b))));
}

// PRODUCTS of them, from one on, and eight lanes. All sums stay in registers.
template <int PRODUCTS>
void gradient_tile(const DepthwiseGradientLine& l, int64_t lane, int64_t first) {
  const __m256i zero = _mm256_set1_epi16(static_cast<int16_t>(l.row_zero));
  const uint8_t* at[PRODUCTS];
  __m256i sums[PRODUCTS];
#pragma GCC unroll 9
  for (int k = 0; k < PRODUCTS; ++k) {
    at[k] = l.base + lane + l.offsets[first + k];
    sums[k] = _mm256_setzero_si256();
  }
  for (int64_t x = 0; x < l.pixels; x += 2) {
    // The last pixel of an odd number is its own partner, in a row of zeros.
    const bool alone = x + 1 == l.pixels;
    const uint8_t* row = l.rows + x * l.pitch + lane;
    const __m256i rows = _mm256_sub_epi16(load_two(row, row + (alone ? 0 : l.pitch)), zero);
    const __m256i two = _mm256_and_si256(rows, _mm256_set1_epi32(alone ? 0xffff : -1));
    const int64_t place = x * l.step, next = place + (alone ? 0 : l.step);
#pragma GCC unroll 9
    for (int k = 0; k < PRODUCTS; ++k)
      sums[k] = _mm256_add_epi32(sums[k], _mm256_madd_epi16(load_two(at[k] + place, at[k] + next), two));
  }
#pragma GCC unroll 9
  for (int k = 0; k < PRODUCTS; ++k) {
    __m256i* total = reinterpret_cast<__m256i*>(l.totals + (1 + first + k) * LANE_BLOCK + lane);
    _mm256_storeu_si256(total, _mm256_add_epi32(_mm256_loadu_si256(total), sums[k]));
  }
}

void sum_rows(const DepthwiseGradientLine& l) {
  for (int64_t lane = 0; lane < LANE_BLOCK; lane += 8) {
    __m256i sum = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(l.totals + lane));
    for (int64_t x = 0; x < l.pixels; ++x) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(l.rows + x * l.pitch + lane));
      sum = _mm256_add_epi32(sum, _mm256_sub_epi32(_mm256_cvtepu8_epi32(bytes), _mm256_set1_epi32(l.row_zero)));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(l.totals + lane), sum);
  }
}

constexpr BlockFunction FEW[5][2] = {{few<1, false>, few<1, true>},
                                     {few<2, false>, few<2, true>},
                                     {few<3, false>, few<3, true>},
                                     {few<4, false>, few<4, true>},
                                     {few<5, false>, few<5, true>}};

}  // namespace

void depthwise_avx2(const DepthwiseLines& l) {
  const bool all_fit = 0 < l.pairs && l.pairs <= l.fit && l.pairs <= 5;
  const BlockFunction function = l.fit == 0 ? wide : all_fit ? FEW[l.pairs - 1][l.bias != nullptr] : many;
  for (int64_t lane = 0; lane < l.channels; lane += LANE_BLOCK) {
    Block block{l.base + lane,  l.offsets,        l.pairs,       l.step, l.fit, l.weights + 2 * lane * l.pairs,
                l.start + lane, l.factor + lane, l.bias ? l.bias + lane : nullptr};
    float* out = l.out + lane;
    for (int64_t y = 0; y < l.lines; ++y, block.base += l.line_step, out += l.line_pitch) {
      if (l.channels - lane >= LANE_BLOCK) {
        function(block, l.pixels, out, l.pitch);
        continue;
      }
      // What the lanes that fill up get is left out.
      alignas(32) float all[LANE_BLOCK];
      Block pixel = block;
      for (int64_t x = 0; x < l.pixels; ++x, pixel.base += l.step) {
        function(pixel, 1, all, LANE_BLOCK);
        __builtin_memcpy(out + x * l.pitch, all, (l.channels - lane) * sizeof(float));
      }
    }
  }
}

void depthwise_gradient_avx2(const DepthwiseGradientLine& l) {
  sum_rows(l);
  for (int64_t lane = 0; lane < LANE_BLOCK; lane += 8) {
    int64_t k = 0;
    for (; k + 9 <= l.products; k += 9) gradient_tile<9>(l, lane, k);
    for (; k + 3 <= l.products; k += 3) gradient_tile<3>(l, lane, k);
    for (; k < l.products; ++k) gradient_tile<1>(l, lane, k);
  }
}

}  // namespace bitorch_engine
