#include <immintrin.h>

#include "bits/bits.h"
#include "linear/digits.h"
#include "linear/linear.h"
#include "qconv/qconv.h"

namespace bitorch_engine {
namespace {

constexpr int64_t WIDTH = 32;

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

struct Sums {
  __m256i low, middle, high;
};

inline void widen_add(__m256i& total, __m256i pairs) {
  total = _mm256_add_epi32(total, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// At most SOME vectors of bytes of two rows, whose pairs of products fit 16 bits together: 2 * 15 * 128 * 8 at 4 bits.
template <int BITS>
inline void add_some(const uint8_t* a, const uint8_t* b, const int8_t* digits, int64_t vectors, Sums& of_a, Sums& of_b) {
  __m256i p = _mm256_setzero_si256(), q = p, r = p, s = p, t = p, u = p;
#pragma GCC unroll 1
  for (int64_t v = 0; v < vectors; ++v, a += WIDTH, b += WIDTH) {
    const __m256i bytes_a = load(a), bytes_b = load(b);
#pragma GCC unroll 8
    for (int j = 0; j < 8 / BITS; ++j, digits += 3 * WIDTH) {
      __m256i low = load(digits), middle = load(digits + WIDTH), high = load(digits + 2 * WIDTH);
      asm("" : "+x"(low), "+x"(middle), "+x"(high));  // loaded once for both rows
      const __m256i wa = values<BITS>(bytes_a, j), wb = values<BITS>(bytes_b, j);
      p = _mm256_add_epi16(p, _mm256_maddubs_epi16(wa, low));
      q = _mm256_add_epi16(q, _mm256_maddubs_epi16(wa, middle));
      r = _mm256_add_epi16(r, _mm256_maddubs_epi16(wa, high));
      s = _mm256_add_epi16(s, _mm256_maddubs_epi16(wb, low));
      t = _mm256_add_epi16(t, _mm256_maddubs_epi16(wb, middle));
      u = _mm256_add_epi16(u, _mm256_maddubs_epi16(wb, high));
      // GCC would load what all steps need first, and have no registers for it.
      asm volatile("" : "+x"(p), "+x"(q), "+x"(r), "+x"(s), "+x"(t), "+x"(u)::"memory");
    }
  }
  widen_add(of_a.low, p);
  widen_add(of_a.middle, q);
  widen_add(of_a.high, r);
  widen_add(of_b.low, s);
  widen_add(of_b.middle, t);
  widen_add(of_b.high, u);
}

inline __m256 scaled(const Sums& sums, const float* scales, __m256 to) {
  to = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums.low), _mm256_set1_ps(scales[0]), to);
  to = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums.middle), _mm256_set1_ps(scales[1]), to);
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums.high), _mm256_set1_ps(scales[2]), to);
}

inline float sum_of(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

template <int BITS>
void dot_two(const uint8_t* a, const uint8_t* b, int64_t row_bytes, const Digits& x, float* sums) {
  constexpr int64_t BYTES = GROUP * BITS / 8, VECTORS = BYTES / WIDTH, SOME = VECTORS < 4 ? VECTORS : 4;
  __m256 sum_a = _mm256_setzero_ps(), sum_b = sum_a;
  uint8_t last[2][BYTES];
  const int8_t* digits = x.digits;
  for (int64_t start = 0, g = 0; start < row_bytes; start += BYTES, ++g) {
    const uint8_t *from_a = a + start, *from_b = b + start;
    const int64_t left = row_bytes - start, vectors = left < BYTES ? (left + WIDTH - 1) / WIDTH : VECTORS;
    if (left < vectors * WIDTH) {  // what follows is another row, or not there
      __builtin_memset(last, 0, sizeof last);
      __builtin_memcpy(last[0], from_a, left);
      __builtin_memcpy(last[1], from_b, left);
      from_a = last[0];
      from_b = last[1];
    }
    const int32_t* corrections = x.corrections + 48 * g;
    Sums of_a{load(corrections), load(corrections + 16), load(corrections + 32)}, of_b = of_a;
    for (int64_t v = 0; v < vectors; v += SOME, digits += SOME * (8 / BITS) * 3 * WIDTH) {
      const int64_t some = vectors - v < SOME ? vectors - v : SOME;
      add_some<BITS>(from_a + v * WIDTH, from_b + v * WIDTH, digits, some, of_a, of_b);
    }
    for (int64_t line = 0; line < vectors * WIDTH; line += 64) {  // of the next two rows
      __builtin_prefetch(a + start + line + 2 * row_bytes);
      __builtin_prefetch(b + start + line + 2 * row_bytes);
    }
    sum_a = scaled(of_a, x.scales + 3 * g, sum_a);
    sum_b = scaled(of_b, x.scales + 3 * g, sum_b);
  }
  sums[0] = sum_of(sum_a);
  sums[1] = sum_of(sum_b);
}

}  // namespace

bool split_digits_avx2(const float* x, int bits, const Digits& to) { return split_digits<WIDTH>(x, bits, to); }

void split_bytes_avx2(const uint8_t* bytes, int zero, int bits, const Digits& to) {
  split_bytes<WIDTH>(bytes, zero, bits, to);
}

void dot_digits_avx2(const uint8_t* const* weights, int64_t channels, int64_t row_bytes, int bits, const Digits* x,
                     int64_t rows, float* sums) {
  const auto dot = bits == 1 ? dot_two<1> : bits == 2 ? dot_two<2> : dot_two<4>;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < channels; c += 2) dot(weights[c], weights[c + 1], row_bytes, x[r], sums + r * channels + c);
}

float dot_avx2(const uint8_t* packed, const float* x, int64_t count, int bits) {
  constexpr int64_t PIECE = 512;
  const __m256i low = _mm256_set1_epi32(lowest_code(bits));
  const auto unpack = unpack_kernel.pick();
  uint8_t index[PIECE];
  __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
  int64_t start = 0;
  for (; start + 32 <= count;) {
    const int64_t some = count - start < PIECE ? (count - start) & ~int64_t{31} : PIECE;
    const uint8_t* from = packed + start / 8 * bits;
    if (bits != 8) unpack(from, index, some, bits);
    const uint8_t* values = bits == 8 ? from : index;
    for (int64_t k = 0; k < some; k += 32)
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values + k + 8 * q));
        const __m256i steps = _mm256_slli_epi32(_mm256_cvtepu8_epi32(eight), bits == 1);
        const __m256 codes = _mm256_cvtepi32_ps(_mm256_add_epi32(steps, low));
        sums[q] = _mm256_fmadd_ps(codes, _mm256_loadu_ps(x + start + k + 8 * q), sums[q]);
      }
    start += some;
  }
  const float sum = sum_of(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
  return sum + (start < count ? dot_scalar(packed + start / 8 * bits, x + start, count - start, bits) : 0.0f);
}

}  // namespace bitorch_engine
