#include <immintrin.h>

#include "depthwise/depthwise.h"

namespace bitorch_engine {
namespace {

// Products k and k + 1 of 32 lanes beside each other, in the order of place_of_lane.
inline __m512i load_pairs(const uint8_t* a, const uint8_t* b) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a));
  const __m256i y = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_unpacklo_epi8(x, y)), _mm256_unpackhi_epi8(x, y), 1);
}

struct Totals {
  __m512i first, second;  // lanes 0-7 and 16-23, 8-15 and 24-31
};

inline void add(Totals& totals, __m512i sums) {
  totals.first = _mm512_add_epi32(totals.first, _mm512_cvtepi16_epi32(_mm512_castsi512_si256(sums)));
  totals.second = _mm512_add_epi32(totals.second, _mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(sums, 1)));
}

inline void store(const DepthwiseLines& l, int64_t lane, __m512i total, float* out) {
  const __m512 value = _mm512_cvtepi32_ps(_mm512_add_epi32(total, _mm512_loadu_si512(l.start + lane)));
  const __m512 scaled = _mm512_mul_ps(value, _mm512_loadu_ps(l.factor + lane));
  const int64_t some = l.channels - lane;
  const __mmask16 mask = some >= 16 ? 0xffff : some <= 0 ? 0 : static_cast<__mmask16>((1 << some) - 1);
  _mm512_mask_storeu_ps(out + lane, mask, l.bias ? _mm512_add_ps(scaled, _mm512_loadu_ps(l.bias + lane)) : scaled);
}

inline void store(const DepthwiseLines& l, int64_t lane, const Totals& totals, float* out) {
  store(l, lane, _mm512_shuffle_i64x2(totals.first, totals.second, 0x44), out);
  store(l, lane + 16, _mm512_shuffle_i64x2(totals.first, totals.second, 0xee), out);
}

inline Totals none() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }

// All sums of a lane fit 16 bits, and the weights of a block stay in registers.
template <int PAIRS>
void few(const DepthwiseLines& l) {
  for (int64_t lane = 0; lane < l.channels; lane += LANE_BLOCK) {
    const int8_t* weights = l.weights + 2 * lane * PAIRS;
    const uint8_t* at[2 * PAIRS];
    __m512i w[PAIRS];
#pragma GCC unroll 5
    for (int k = 0; k < PAIRS; ++k) {
      at[2 * k] = l.base + lane + l.offsets[2 * k];
      at[2 * k + 1] = l.base + lane + l.offsets[2 * k + 1];
      w[k] = _mm512_loadu_si512(weights + 64 * k);
    }
    float* out = l.out;
    for (int64_t place = 0; place < l.pixels * l.step; place += l.step, out += l.pitch) {
      __m512i sums;
#pragma GCC unroll 5
      for (int k = 0; k < PAIRS; ++k) {
        const __m512i two = _mm512_maddubs_epi16(load_pairs(at[2 * k] + place, at[2 * k + 1] + place), w[k]);
        sums = k ? _mm512_add_epi16(sums, two) : two;
      }
      Totals totals = none();
      add(totals, sums);
      store(l, lane, totals, out);
    }
  }
}

// Any number of products: `fit` pairs are added in 16 bits before they are widened.
void many(const DepthwiseLines& l) {
  for (int64_t lane = 0; lane < l.channels; lane += LANE_BLOCK) {
    const int8_t* weights = l.weights + 2 * lane * l.pairs;
    for (int64_t x = 0; x < l.pixels; ++x) {
      const uint8_t* base = l.base + x * l.step + lane;
      Totals totals = none();
      for (int64_t k = 0; k < l.pairs;) {
        const int64_t end = l.pairs - k < l.fit ? l.pairs : k + l.fit;
        __m512i sums = _mm512_setzero_si512();
        for (; k < end; ++k) {
          const __m512i pairs = load_pairs(base + l.offsets[2 * k], base + l.offsets[2 * k + 1]);
          sums = _mm512_add_epi16(sums, _mm512_maddubs_epi16(pairs, _mm512_loadu_si512(weights + 64 * k)));
        }
        add(totals, sums);
      }
      store(l, lane, totals, l.out + x * l.pitch);
    }
  }
}

// Not even two products fit 16 bits (8-bit weights and activations): both are widened first.
void wide(const DepthwiseLines& l) {
  for (int64_t lane = 0; lane < l.channels; lane += LANE_BLOCK) {
    const int8_t* weights = l.weights + 2 * lane * l.pairs;
    for (int64_t x = 0; x < l.pixels; ++x) {
      const uint8_t* base = l.base + x * l.step + lane;
      Totals totals = none();
      for (int64_t k = 0; k < l.pairs; ++k) {
        const __m512i pairs = load_pairs(base + l.offsets[2 * k], base + l.offsets[2 * k + 1]);
        const __m512i w = _mm512_loadu_si512(weights + 64 * k);
        totals.first = _mm512_dpwssd_epi32(totals.first, _mm512_cvtepu8_epi16(_mm512_castsi512_si256(pairs)),
                                           _mm512_cvtepi8_epi16(_mm512_castsi512_si256(w)));
        totals.second = _mm512_dpwssd_epi32(totals.second, _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(pairs, 1)),
                                            _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(w, 1)));
      }
      store(l, lane, totals, l.out + x * l.pitch);
    }
  }
}

constexpr DepthwiseFunction FEW[5] = {few<1>, few<2>, few<3>, few<4>, few<5>};

// Two pixels of sixteen lanes beside each other, in 16 bits.
inline __m512i load_two(const uint8_t* a, const uint8_t* b) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a));
  const __m128i y = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b));
  return _mm512_cvtepu8_epi16(_mm256_set_m128i(_mm_unpackhi_epi8(x, y), _mm_unpacklo_epi8(x, y)));
}

// PRODUCTS of them, from one on, and sixteen lanes. All sums stay in registers.
template <int PRODUCTS>
void gradient_tile(const DepthwiseGradientLine& l, int64_t lane, int64_t first) {
  const __m512i zero = _mm512_set1_epi16(static_cast<int16_t>(l.row_zero));
  const uint8_t* at[PRODUCTS];
  __m512i sums[PRODUCTS];
#pragma GCC unroll 9
  for (int k = 0; k < PRODUCTS; ++k) {
    at[k] = l.base + lane + l.offsets[first + k];
    sums[k] = _mm512_setzero_si512();
  }
  for (int64_t x = 0; x < l.pixels; x += 2) {
    // The last pixel of an odd number is its own partner, in a row of zeros.
    const bool alone = x + 1 == l.pixels;
    const uint8_t* row = l.rows + x * l.pitch + lane;
    const __m512i rows = _mm512_sub_epi16(load_two(row, row + (alone ? 0 : l.pitch)), zero);
    const __m512i two = _mm512_and_si512(rows, _mm512_set1_epi32(alone ? 0xffff : -1));
    const int64_t place = x * l.step, next = place + (alone ? 0 : l.step);
#pragma GCC unroll 9
    for (int k = 0; k < PRODUCTS; ++k)
      sums[k] = _mm512_dpwssd_epi32(sums[k], load_two(at[k] + place, at[k] + next), two);
  }
#pragma GCC unroll 9
  for (int k = 0; k < PRODUCTS; ++k) {
    int32_t* total = l.totals + (1 + first + k) * LANE_BLOCK + lane;
    _mm512_storeu_si512(total, _mm512_add_epi32(_mm512_loadu_si512(total), sums[k]));
  }
}

void sum_rows(const DepthwiseGradientLine& l) {
  for (int64_t lane = 0; lane < LANE_BLOCK; lane += 16) {
    __m512i sum = _mm512_loadu_si512(l.totals + lane);
    for (int64_t x = 0; x < l.pixels; ++x) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(l.rows + x * l.pitch + lane));
      sum = _mm512_add_epi32(sum, _mm512_sub_epi32(_mm512_cvtepu8_epi32(bytes), _mm512_set1_epi32(l.row_zero)));
    }
    _mm512_storeu_si512(l.totals + lane, sum);
  }
}

}  // namespace

void depthwise_avx512(const DepthwiseLines& l) {
  const bool all_fit = 0 < l.pairs && l.pairs <= l.fit && l.pairs <= 5;
  const DepthwiseFunction function = l.fit == 0 ? wide : all_fit ? FEW[l.pairs - 1] : many;
  DepthwiseLines line = l;  // one at a time
  for (int64_t y = 0; y < l.lines; ++y, line.base += l.line_step, line.out += l.line_pitch) function(line);
}

void depthwise_gradient_avx512(const DepthwiseGradientLine& l) {
  sum_rows(l);
  for (int64_t lane = 0; lane < LANE_BLOCK; lane += 16) {
    int64_t k = 0;
    for (; k + 9 <= l.products; k += 9) gradient_tile<9>(l, lane, k);
    for (; k + 3 <= l.products; k += 3) gradient_tile<3>(l, lane, k);
    for (; k < l.products; ++k) gradient_tile<1>(l, lane, k);
  }
}

}  // namespace bitorch_engine
