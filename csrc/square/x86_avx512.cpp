#include <immintrin.h>

#include "square/square.h"

namespace bitorch_engine {
namespace {

// As with AVX2: sums begin with this more, and are the lower halves of floats between 2**23 and 2**24.
constexpr int BEGIN = 1 << 15;

// The 64 bytes of a pair: of each lane, the first pixel's and the second's.
struct Bytes {
  alignas(64) uint8_t from[64];
  __m512i order() const { return _mm512_load_si512(from); }
};

// From 32 lanes of one pixel and 32 of the other.
constexpr Bytes from_pixels() {
  Bytes bytes{};
  for (int lane = 0; lane < LANE_BLOCK; ++lane)
    for (int pixel = 0; pixel < 2; ++pixel)
      bytes.from[place_in_pair(lane) + pixel] = static_cast<uint8_t>(LANE_BLOCK * pixel + lane);
  return bytes;
}

// From what packing numbers makes of lanes 0-15 and 16-31 of both pixels: four of each in every 128 bits.
constexpr Bytes from_packed() {
  Bytes bytes{};
  for (int lane = 0; lane < LANE_BLOCK; ++lane)
    for (int pixel = 0; pixel < 2; ++pixel)
      bytes.from[place_in_pair(lane) + pixel] =
          static_cast<uint8_t>(lane % 16 / 4 * 16 + 8 * pixel + lane / 16 * 4 + lane % 4);
  return bytes;
}

constexpr Bytes FROM_PIXELS = from_pixels(), FROM_PACKED = from_packed();

// Four lanes, 64 bits, from their own order to that of `place_in_pair`.
inline __m512i in_pairs(__m512i lanes) {
  return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 1, 3, 4, 6, 5, 7), lanes);
}

inline __mmask16 mask_of(int64_t lanes) {
  return lanes >= 16 ? 0xffff : lanes <= 0 ? 0 : static_cast<__mmask16>((1 << lanes) - 1);
}

// What becomes of sums of 32 lanes.
struct Finish {
  __m512 factor[2], bias[2];
  __mmask16 mask[2];

  template <bool BIAS>
  inline void store(__m512i sums, float* out) const {
    const __m512i high = _mm512_set1_epi16(0x4b00);
    const __m512i a = _mm512_unpacklo_epi16(sums, high), b = _mm512_unpackhi_epi16(sums, high);
    store_half<0, BIAS>(_mm512_shuffle_i64x2(a, b, 0x44), out);
    store_half<1, BIAS>(_mm512_shuffle_i64x2(a, b, 0xee), out + 16);
  }
  template <int HALF, bool BIAS>
  inline void store_half(__m512i sums, float* out) const {
    const __m512 totals = _mm512_sub_ps(_mm512_castsi512_ps(sums), _mm512_set1_ps(0x1p23f + BEGIN));
    const __m512 scaled = _mm512_mul_ps(totals, factor[HALF]);
    _mm512_mask_storeu_ps(out, mask[HALF], BIAS ? _mm512_add_ps(scaled, bias[HALF]) : scaled);
  }
};

inline void add_products(__m512i& sums, __m512i pair, const int8_t* weights) {
  sums = _mm512_add_epi16(sums, _mm512_maddubs_epi16(pair, _mm512_loadu_si512(weights)));
}

// A block of lanes, from lines of pairs. A pair is read once a row, for the results that end with it and for those that
// begin with it.
template <bool BIAS, bool STRIDED>
void multiply(const SquareLine& l, int64_t lane) {
  const int64_t place = lane / LANE_BLOCK * l.block_step;
  const uint8_t* rows[3] = {l.rows[0] + place, l.rows[1] + place, l.rows[2] + place};
  const int8_t* weights = l.weights + lane / LANE_BLOCK * SQUARE_BYTES;
  const auto of = [&](int row, int i) { return weights + row * SQUARE_ROW + i * 2 * LANE_BLOCK; };
  const __m256i low = _mm512_cvtepi32_epi16(_mm512_loadu_si512(l.start + lane));
  const __m256i high = _mm512_cvtepi32_epi16(_mm512_loadu_si512(l.start + lane + 16));
  const __m512i sums = in_pairs(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
  const __m512i start = _mm512_add_epi16(sums, _mm512_set1_epi16(static_cast<int16_t>(BEGIN)));
  Finish finish;
  for (int64_t i = 0; i < 2; ++i) {
    finish.factor[i] = _mm512_loadu_ps(l.factor + lane + 16 * i);
    finish.bias[i] = BIAS ? _mm512_loadu_ps(l.bias + lane + 16 * i) : _mm512_setzero_ps();
    finish.mask[i] = mask_of(l.channels - lane - 16 * i);
  }
  __m512i p = start, q = start;  // of results that begin with the first pixel, and with the second
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    const __m512i pair = _mm512_loadu_si512(rows[i]);
    add_products(p, pair, of(i, 0));
    if (!STRIDED) add_products(q, pair, of(i, 2));
  }
  float* out = l.out + lane;
  int64_t next = 2 * LANE_BLOCK;
  for (int64_t x = 0; x < l.pixels; x += STRIDED ? 1 : 2, next += 2 * LANE_BLOCK) {
    __m512i next_p = start, next_q = start;
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      const __m512i pair = _mm512_loadu_si512(rows[i] + next);
      add_products(p, pair, of(i, 1));
      add_products(next_p, pair, of(i, 0));
      if (!STRIDED) add_products(q, pair, of(i, 3));
      if (!STRIDED) add_products(next_q, pair, of(i, 2));
    }
    finish.store<BIAS>(p, out);
    out += l.pitch;
    if (!STRIDED && x + 1 < l.pixels) {
      finish.store<BIAS>(q, out);
      out += l.pitch;
    }
    p = next_p;
    q = next_q;
  }
}

// A line of floats as pairs of pixels, 32 channels at a time; a pixel in the padding is 0. Returns whether a value was
// odd.
template <bool SIGNED, bool NARROW>
bool quantize(const FloatLine& l, const ActivationRule& rule, uint8_t* pairs) {
  const __m512 inverse = _mm512_set1_ps(rule.inverse_scale);
  const __m512i order = FROM_PACKED.order();
  const __m512i below = _mm512_set1_epi8(static_cast<char>(128 + static_cast<int>(rule.low)));
  const __m512i largest = _mm512_set1_epi8(static_cast<char>((1 << rule.bits) - 1));
  __m512i least = _mm512_setzero_si512();
  for (int64_t x = -l.before; x < l.padded - l.before; x += 2, pairs += 2 * LANE_BLOCK)
    for (int64_t c = 0; c < l.channels; c += LANE_BLOCK) {
      __m512i codes[2];
#pragma GCC unroll 2
      for (int64_t i = 0; i < 2; ++i) {
        const bool there = 0 <= x + i && x + i < l.pixels;
        const float* from = l.x + (there ? (x + i) * l.pixel_stride + c : 0);
        const int64_t some = there ? l.channels - c : 0;
        const __m512 low = _mm512_maskz_loadu_ps(mask_of(some), from);
        const __m512 high = _mm512_maskz_loadu_ps(mask_of(some - 16), from + 16);
        codes[i] = _mm512_packs_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(low, inverse)),
                                      _mm512_cvtps_epi32(_mm512_mul_ps(high, inverse)));
        least = _mm512_min_epi16(least, codes[i]);
      }
      __m512i index = _mm512_packus_epi16(codes[0], codes[1]);
      if (SIGNED) index = _mm512_xor_si512(_mm512_packs_epi16(codes[0], codes[1]), _mm512_set1_epi8(-128));
      if (SIGNED && NARROW) index = _mm512_subs_epu8(index, below);
      if (NARROW) index = _mm512_min_epu8(index, largest);
      _mm512_storeu_si512(pairs + c * l.padded, _mm512_permutexvar_epi8(order, index));
    }
  return _mm512_cmple_epi16_mask(least, _mm512_set1_epi16(INT16_MIN)) != 0;
}

}  // namespace

void square_avx512(const SquareLine& l) {
  const auto function = l.bias ? (l.strided ? multiply<true, true> : multiply<true, false>)
                               : (l.strided ? multiply<false, true> : multiply<false, false>);
  for (int64_t lane = 0; lane < l.channels; lane += LANE_BLOCK) function(l, lane);
}

void pair_pixels_avx512(const uint8_t* line, int64_t pixels, int64_t lanes, uint8_t* pairs) {
  const __m512i order = FROM_PIXELS.order();
  for (int64_t lane = 0; lane < lanes; lane += LANE_BLOCK)
    for (int64_t x = 0; x < pixels; x += 2, pairs += 2 * LANE_BLOCK) {
      const __m256i* at = reinterpret_cast<const __m256i*>(line + x * lanes + lane);
      const __m256i* next = reinterpret_cast<const __m256i*>(line + (x + 1) * lanes + lane);
      const __m512i first = _mm512_castsi256_si512(_mm256_loadu_si256(at));
      const __m512i both = _mm512_inserti64x4(first, _mm256_loadu_si256(next), 1);
      _mm512_storeu_si512(pairs, _mm512_permutexvar_epi8(order, both));
    }
}

bool quantize_pairs_avx512(const FloatLine& l, ActivationRule rule, uint8_t* pairs) {
  const auto function = rule.low < 0 ? (rule.bits < 8 ? quantize<true, true> : quantize<true, false>)
                                     : (rule.bits < 8 ? quantize<false, true> : quantize<false, false>);
  return function(l, rule, pairs) && quantize_pairs_scalar(l, rule, pairs);
}

}  // namespace bitorch_engine
