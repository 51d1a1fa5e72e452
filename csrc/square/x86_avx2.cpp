#include <immintrin.h>

#include <cstring>

#include "square/square.h"

namespace bitorch_engine {
namespace {

inline __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
inline void store(void* to, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(to), x); }

// GCC 12 sends what it loads and uses twice through the stack, unless it is told not to.
inline __m256i in_register(__m256i x) {
  asm("" : "+x"(x));
  return x;
}

// Sums of 16 lanes are those of the products and this: so that, as unsigned numbers, they are the lower halves of
// floats between 2**23 and 2**24. One instruction widens eight of them and one subtracts, where integers would take
// four.
constexpr int BEGIN = 1 << 15;

// What becomes of sums of 16 lanes.
struct Finish {
  __m256 factor[2], bias[2];

  template <bool BIAS>
  inline void store(__m256i sums, float* out) const {
    const __m256i high = _mm256_set1_epi16(0x4b00);
    store_half<0, BIAS>(_mm256_unpacklo_epi16(sums, high), out);
    store_half<1, BIAS>(_mm256_unpackhi_epi16(sums, high), out + 8);
  }
  template <int HALF, bool BIAS>
  inline void store_half(__m256i sums, float* out) const {
    const __m256 totals = _mm256_sub_ps(_mm256_castsi256_ps(sums), _mm256_set1_ps(0x1p23f + BEGIN));
    const __m256 scaled = _mm256_mul_ps(totals, factor[HALF]);
    _mm256_storeu_ps(out, BIAS ? _mm256_add_ps(scaled, bias[HALF]) : scaled);
  }
};

inline void add_products(__m256i& sums, __m256i pair, const int8_t* weights) {
  sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(pair, load(weights)));
}

// What 16 lanes of a line read.
struct Lanes {
  const uint8_t* rows[3];
  const int8_t* weights;
  __m256i start;
  Finish finish;

  template <bool BIAS>
  static inline Lanes at(const SquareLine& l, int64_t lane) {
    const int64_t block = lane / LANE_BLOCK, half = 2 * (lane % LANE_BLOCK), place = block * l.block_step + half;
    Lanes lanes{
        {l.rows[0] + place, l.rows[1] + place, l.rows[2] + place}, l.weights + block * SQUARE_BYTES + half, {}, {}};
    const __m256i sums = _mm256_packs_epi32(load(l.start + lane), load(l.start + lane + 8));
    lanes.start = _mm256_add_epi16(sums, _mm256_set1_epi16(static_cast<int16_t>(BEGIN)));
    for (int64_t i = 0; i < 2; ++i) {
      lanes.finish.factor[i] = _mm256_loadu_ps(l.factor + lane + 8 * i);
      lanes.finish.bias[i] = BIAS ? _mm256_loadu_ps(l.bias + lane + 8 * i) : _mm256_setzero_ps();
    }
    return lanes;
  }
};

// 16 lanes of results. A pair is read once a row, for the results that end with it and for those that begin with it.
template <bool BIAS, bool STRIDED>
inline void multiply(const Lanes& l, int64_t pixels, float* out, int64_t pitch) {
  const auto of = [&](int row, int i) { return l.weights + row * SQUARE_ROW + i * 2 * LANE_BLOCK; };
  __m256i p = l.start, q = l.start;  // of results that begin with the first pixel, and with the second
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    const __m256i pair = in_register(load(l.rows[i]));
    add_products(p, pair, of(i, 0));
    if (!STRIDED) add_products(q, pair, of(i, 2));
  }
  int64_t next = 2 * LANE_BLOCK;
  for (int64_t x = 0; x < pixels; x += STRIDED ? 1 : 2, next += 2 * LANE_BLOCK) {
    __m256i next_p = l.start, next_q = l.start;
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      const __m256i pair = in_register(load(l.rows[i] + next));
      add_products(p, pair, of(i, 1));
      add_products(next_p, pair, of(i, 0));
      if (!STRIDED) add_products(q, pair, of(i, 3));
      if (!STRIDED) add_products(next_q, pair, of(i, 2));
      asm volatile("" : "+x"(p), "+x"(q), "+x"(next_p), "+x"(next_q)::"memory");  // no loads for later steps yet
    }
    l.finish.store<BIAS>(p, out);
    out += pitch;
    if (!STRIDED && x + 1 < pixels) {
      l.finish.store<BIAS>(q, out);
      out += pitch;
    }
    p = next_p;
    q = next_q;
  }
}

template <bool BIAS, bool STRIDED>
void multiply_line(const SquareLine& l) {
  const int64_t whole = l.channels & -16, some = l.channels - whole;
  for (int64_t lane = 0; lane < whole; lane += 16)
    multiply<BIAS, STRIDED>(Lanes::at<BIAS>(l, lane), l.pixels, l.out + lane, l.pitch);
  if (some == 0) return;
  // What the lanes that fill up get is left out.
  constexpr int64_t PIXELS = 16;
  alignas(32) float all[PIXELS * 16];
  Lanes lanes = Lanes::at<BIAS>(l, whole);
  for (int64_t x = 0; x < l.pixels; x += PIXELS) {
    const int64_t count = l.pixels - x < PIXELS ? l.pixels - x : PIXELS;
    multiply<BIAS, STRIDED>(lanes, count, all, 16);
    for (const uint8_t*& row : lanes.rows) row += PIXELS * LANE_BLOCK * (STRIDED ? 2 : 1);
    float* out = l.out + x * l.pitch + whole;
    for (int64_t i = 0; i < count; ++i) std::memcpy(out + i * l.pitch, all + 16 * i, some * sizeof(float));
  }
}

// A pair of pixels, of 32 lanes in the order of Quantizer::block.
inline void put(uint8_t* to, __m256i first, __m256i second) {
  store(to, _mm256_unpacklo_epi8(first, second));
  store(to + LANE_BLOCK, _mm256_unpackhi_epi8(first, second));
}

// Floats to indices.
template <bool SIGNED, bool NARROW>
class Quantizer {
 public:
  explicit Quantizer(const ActivationRule& rule)
      : inverse_(_mm256_set1_ps(rule.inverse_scale)),
        below_(_mm256_set1_epi8(static_cast<char>(128 + static_cast<int>(rule.low)))),
        largest_(_mm256_set1_epi8(static_cast<char>((1 << rule.bits) - 1))) {}

  // 32 channels of a pixel, in the order that packing leaves: 0-3, 8-11, 16-19, 24-27, then the others.
  __m256i block(const float* x) {
    const __m256i low = codes(x), high = codes(x + 16);
    __m256i index = _mm256_packus_epi16(low, high);
    if (SIGNED) index = _mm256_xor_si256(_mm256_packs_epi16(low, high), _mm256_set1_epi8(-128));
    if (SIGNED && NARROW) index = _mm256_subs_epu8(index, below_);
    return NARROW ? _mm256_min_epu8(index, largest_) : index;
  }
  // Whether a value was not finite, or has a code below all of 16 bits.
  bool odd() const { return _mm256_movemask_epi8(_mm256_cmpeq_epi16(least_, _mm256_set1_epi16(INT16_MIN))) != 0; }

 private:
  __m256i codes(const float* x) {
    const __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), inverse_));
    const __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8), inverse_));
    const __m256i both = _mm256_packs_epi32(low, high);
    least_ = _mm256_min_epi16(least_, both);
    return both;
  }

  __m256 inverse_;
  __m256i below_, largest_;  // 128 + the lowest code, where it is negative; the largest index
  __m256i least_ = _mm256_setzero_si256();
};

// A pair of pixels of a line; null: a pixel in the padding. to: of the first block of lanes.
template <bool SIGNED, bool NARROW>
inline __attribute__((always_inline)) void quantize_pair(Quantizer<SIGNED, NARROW>& quantizer, __m256i zero,
                                                         const FloatLine& l, const float* a, const float* b,
                                                         uint8_t* to) {
  const int64_t whole = l.channels & -LANE_BLOCK, block_step = LANE_BLOCK * l.padded;
  for (int64_t c = 0; c < whole; c += LANE_BLOCK, to += block_step)
    put(to, a ? quantizer.block(a + c) : zero, b ? quantizer.block(b + c) : zero);
  const int64_t rest = l.channels - whole;
  if (rest == 0) return;
  alignas(32) float last[2][LANE_BLOCK] = {};
  if (a) std::memcpy(last[0], a + whole, rest * sizeof(float));
  if (b) std::memcpy(last[1], b + whole, rest * sizeof(float));
  put(to, quantizer.block(last[0]), quantizer.block(last[1]));
}

template <bool SIGNED, bool NARROW>
bool quantize(const FloatLine& l, const ActivationRule& rule, uint8_t* pairs) {
  static constexpr float ZEROS[LANE_BLOCK] = {};
  Quantizer<SIGNED, NARROW> quantizer(rule);
  const __m256i zero = quantizer.block(ZEROS);
  const auto at = [&](int64_t x) { return 0 <= x && x < l.pixels ? l.x + x * l.pixel_stride : nullptr; };
  const auto edge = [&](int64_t x) {
    quantize_pair(quantizer, zero, l, at(x), at(x + 1), pairs + (x + l.before) * LANE_BLOCK);
  };
  int64_t x = -l.before;
  for (; x < 0; x += 2) edge(x);
  for (; x + 1 < l.pixels; x += 2) {
    const float* a = l.x + x * l.pixel_stride;
    quantize_pair(quantizer, zero, l, a, a + l.pixel_stride, pairs + (x + l.before) * LANE_BLOCK);
  }
  for (; x < l.padded - l.before; x += 2) edge(x);
  return quantizer.odd();
}

}  // namespace

void square_avx2(const SquareLine& l) {
  const auto function = l.bias ? (l.strided ? multiply_line<true, true> : multiply_line<true, false>)
                               : (l.strided ? multiply_line<false, true> : multiply_line<false, false>);
  function(l);
}

void pair_pixels_avx2(const uint8_t* line, int64_t pixels, int64_t lanes, uint8_t* pairs) {
  const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  for (int64_t lane = 0; lane < lanes; lane += LANE_BLOCK)
    for (int64_t x = 0; x < pixels; x += 2, pairs += 64) {
      const uint8_t* at = line + x * lanes + lane;
      const __m256i a = _mm256_permutevar8x32_epi32(load(at), order);
      const __m256i b = _mm256_permutevar8x32_epi32(load(at + lanes), order);
      store(pairs, _mm256_unpacklo_epi8(a, b));
      store(pairs + LANE_BLOCK, _mm256_unpackhi_epi8(a, b));
    }
}

bool quantize_pairs_avx2(const FloatLine& l, ActivationRule rule, uint8_t* pairs) {
  const auto function = rule.low < 0 ? (rule.bits < 8 ? quantize<true, true> : quantize<true, false>)
                                     : (rule.bits < 8 ? quantize<false, true> : quantize<false, false>);
  return function(l, rule, pairs) && quantize_pairs_scalar(l, rule, pairs);
}

}  // namespace bitorch_engine
