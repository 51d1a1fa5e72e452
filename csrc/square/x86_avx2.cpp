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

// Sums of 16 lanes are those of the products and this: so that, as unsigned numbers, they are the lower halves of floats
// between 2**23 and 2**24. One instruction widens eight of them and one subtracts, where integers would take four.
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

// 16 lanes of a square.
struct Lanes {
  // Of each row: where a result begins with the first of two pixels, taps (0, 1) and (2, none) of that pair and the next;
  // where it begins with the second, (none, 0) and (1, 2).
  __m256i weights[3][4];
  __m256i start;
  Finish finish;

  Lanes(const SquareLines& l, int64_t lane) {
    const int64_t half = lane % LANE_BLOCK;
    const int8_t* of_block = l.weights + 2 * (lane - half) * l.pairs;
    __m256i pairs[6] = {};  // of products (0, 1), (2, 3), ..., in the order of `place_in_pair`
    for (int64_t k = 0; k < 5; ++k) {
      const __m256i a = load(of_block + 64 * k), b = load(of_block + 64 * k + 32);
      const __m256i lanes = half ? _mm256_permute2x128_si256(a, b, 0x31) : _mm256_permute2x128_si256(a, b, 0x20);
      pairs[k] = _mm256_permute4x64_epi64(lanes, 0xd8);
    }
    const __m256i first = _mm256_set1_epi16(0xff);
    for (int64_t i = 0; i < 3; ++i) {
      const __m256i a = pairs[3 * i / 2], b = pairs[3 * i / 2 + 1];
      const __m256i across = _mm256_or_si256(_mm256_srli_epi16(a, 8), _mm256_slli_epi16(b, 8));
      const bool even = i % 2 == 0;  // a and b are (0, 1), (2, .), or else (., 0), (1, 2)
      weights[i][0] = even ? a : across;
      weights[i][1] = even ? _mm256_and_si256(b, first) : _mm256_srli_epi16(b, 8);
      weights[i][2] = even ? _mm256_slli_epi16(a, 8) : _mm256_andnot_si256(first, a);
      weights[i][3] = even ? across : b;
    }
    start = _mm256_packs_epi32(load(l.start + lane), load(l.start + lane + 8));
    start = _mm256_add_epi16(start, _mm256_set1_epi16(static_cast<int16_t>(BEGIN)));
    for (int64_t i = 0; i < 2; ++i) {
      finish.factor[i] = _mm256_loadu_ps(l.factor + lane + 8 * i);
      finish.bias[i] = l.bias ? _mm256_loadu_ps(l.bias + lane + 8 * i) : _mm256_setzero_ps();
    }
  }
};

inline void add_products(__m256i& sums, __m256i pair, __m256i weights) {
  sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(pair, weights));
}

// Lines of results from lines of pairs that begin at `base`. A pair is read once a row, for the results that end with it and
// for those that begin with it.
template <bool BIAS, bool STRIDED>
void multiply(const Lanes& lanes, const SquareLines& l, const uint8_t* base, int64_t lines, int64_t pixels, float* first,
              int64_t pitch) {
  const __m256i start = lanes.start;
  const Finish finish = lanes.finish;
  for (int64_t y = 0; y < lines; ++y, base += l.line_step, first += l.line_pitch) {
    const uint8_t* rows[3] = {base + l.offsets[0], base + l.offsets[3], base + l.offsets[6]};
    __m256i p = start, q = start;  // of results that begin with the first pixel, and with the second
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      const __m256i pair = in_register(load(rows[i]));
      add_products(p, pair, lanes.weights[i][0]);
      if (!STRIDED) add_products(q, pair, lanes.weights[i][2]);
    }
    float* out = first;
    int64_t place = 2 * LANE_BLOCK;
    for (int64_t x = 0; x < pixels; x += STRIDED ? 1 : 2, place += 2 * LANE_BLOCK) {
      __m256i next_p = start, next_q = start;
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
        const __m256i pair = in_register(load(rows[i] + place));
        add_products(p, pair, lanes.weights[i][1]);
        add_products(next_p, pair, lanes.weights[i][0]);
        if (!STRIDED) add_products(q, pair, lanes.weights[i][3]);
        if (!STRIDED) add_products(next_q, pair, lanes.weights[i][2]);
        asm volatile("" : "+x"(p), "+x"(q), "+x"(next_p), "+x"(next_q)::"memory");  // no loads for later steps yet
      }
      finish.store<BIAS>(p, out);
      out += pitch;
      if (!STRIDED && x + 1 < pixels) {
        finish.store<BIAS>(q, out);
        out += pitch;
      }
      p = next_p;
      q = next_q;
    }
  }
}

// A line of floats in blocks of 32 channels, to pairs.
template <bool SIGNED, bool NARROW>
class Quantizer {
 public:
  explicit Quantizer(const ActivationRule& rule)
      : inverse_(_mm256_set1_ps(rule.inverse_scale)),
        below_(_mm256_set1_epi8(static_cast<char>(128 + static_cast<int>(rule.low)))),
        largest_(_mm256_set1_epi8(static_cast<char>((1 << rule.bits) - 1))) {}

  void pair(const float* a, const float* b, uint8_t* to) {
    const __m256i first = block(a), second = block(b);
    store(to, _mm256_unpacklo_epi8(first, second));
    store(to + LANE_BLOCK, _mm256_unpackhi_epi8(first, second));
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
  // In the order that packing leaves: lanes 0-3, 8-11, 16-19, 24-27, then the others.
  __m256i block(const float* x) {
    const __m256i low = codes(x), high = codes(x + 16);
    __m256i index = _mm256_packus_epi16(low, high);
    if (SIGNED) index = _mm256_xor_si256(_mm256_packs_epi16(low, high), _mm256_set1_epi8(-128));
    if (SIGNED && NARROW) index = _mm256_subs_epu8(index, below_);
    return NARROW ? _mm256_min_epu8(index, largest_) : index;
  }

  __m256 inverse_;
  __m256i below_, largest_;  // 128 + the lowest code, where it is negative; the largest index
  __m256i least_ = _mm256_setzero_si256();
};

template <bool SIGNED, bool NARROW>
bool quantize(const FloatLine& l, const ActivationRule& rule, uint8_t* pairs) {
  alignas(32) static constexpr float ZEROS[LANE_BLOCK] = {};
  const int64_t whole = l.channels & -LANE_BLOCK, rest = (l.channels - whole) * static_cast<int64_t>(sizeof(float));
  const int64_t block_step = LANE_BLOCK * l.padded;
  alignas(32) float last[2][LANE_BLOCK] = {};
  Quantizer<SIGNED, NARROW> quantizer(rule);
  for (int64_t x = -l.before; x < l.padded - l.before; x += 2, pairs += 2 * LANE_BLOCK) {
    const bool has_a = 0 <= x && x < l.pixels, has_b = -1 <= x && x + 1 < l.pixels;
    const float *a = has_a ? l.x + x * l.pixel_stride : ZEROS, *b = has_b ? l.x + (x + 1) * l.pixel_stride : ZEROS;
    const int64_t a_step = has_a ? LANE_BLOCK : 0, b_step = has_b ? LANE_BLOCK : 0;
    uint8_t* to = pairs;
    for (int64_t c = 0; c < whole; c += LANE_BLOCK, a += a_step, b += b_step, to += block_step)
      quantizer.pair(a, b, to);
    if (rest == 0) continue;
    std::memcpy(last[0], a, rest);
    std::memcpy(last[1], b, rest);
    quantizer.pair(last[0], last[1], to);
  }
  return quantizer.odd();
}

}  // namespace

void square_avx2(const SquareLines& l) {
  const bool strided = l.step != LANE_BLOCK;
  const auto function = l.bias ? (strided ? multiply<true, true> : multiply<true, false>)
                               : (strided ? multiply<false, true> : multiply<false, false>);
  for (int64_t lane = 0; lane < l.channels; lane += 16) {
    const Lanes lanes(l, lane);
    const uint8_t* base = l.base + lane / LANE_BLOCK * l.block_step + lane % LANE_BLOCK * 2;
    const int64_t some = l.channels - lane;
    if (some >= 16) {
      function(lanes, l, base, l.lines, l.pixels, l.out + lane, l.pitch);
      continue;
    }
    // What the lanes that fill up get is left out.
    constexpr int64_t PIXELS = 16;
    alignas(32) float all[PIXELS * 16];
    for (int64_t y = 0; y < l.lines; ++y, base += l.line_step)
      for (int64_t x = 0; x < l.pixels; x += PIXELS) {
        const int64_t count = l.pixels - x < PIXELS ? l.pixels - x : PIXELS;
        function(lanes, l, base + x * l.step, 1, count, all, 16);
        float* out = l.out + y * l.line_pitch + x * l.pitch + lane;
        for (int64_t i = 0; i < count; ++i) std::memcpy(out + i * l.pitch, all + 16 * i, some * sizeof(float));
      }
  }
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
