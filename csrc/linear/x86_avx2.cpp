#include <immintrin.h>

#include "bits/bits.h"
#include "linear/digits.h"
#include "linear/linear.h"
#include "qconv/qconv.h"

namespace bitorch_engine {
namespace {

constexpr int64_t WIDTH = 32;
constexpr int64_t AHEAD = 4096;  // bytes that are asked for before they are needed

using Lane = int16_t;

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

inline float sum_of(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// The sums of a group become floats.
inline __m256 add_scaled(__m256 sum, __m256i pairs, float scale) {
  const __m256i four = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(four), _mm256_set1_ps(scale), sum);
}

template <int BITS, int DIGITS>
void dot_two(const uint8_t* a, const uint8_t* b, int64_t row_bytes, const Digits& x, float* sums) {
  constexpr int64_t BYTES = GROUP * BITS / 8;
  __m256 sum_a = _mm256_setzero_ps(), sum_b = sum_a;
  uint8_t last[2][BYTES];
  const int8_t* digits = x.digits;
  for (int64_t start = 0, g = 0; start < row_bytes; start += BYTES, ++g) {
    // Row b lies behind row a: memory is read in one stream, of which this is asked for before it is needed.
    for (int64_t line = 0; line < 2 * BYTES; line += 64) __builtin_prefetch(a + 2 * start + line + AHEAD);
    const uint8_t *from_a = a + start, *from_b = b + start;
    const int64_t left = row_bytes - start, bytes = left < BYTES ? left : BYTES;
    if (bytes % WIDTH) {  // what follows is another row, or not there
      __builtin_memset(last, 0, sizeof last);
      __builtin_memcpy(last[0], from_a, bytes);
      __builtin_memcpy(last[1], from_b, bytes);
      from_a = last[0];
      from_b = last[1];
    }
    __m256i of_a[DIGITS], of_b[DIGITS];
#pragma GCC unroll 3
    for (int d = 0; d < DIGITS; ++d) of_a[d] = of_b[d] = load(x.corrections + (3 * g + d) * WIDEST);
#pragma GCC unroll 1
    for (int64_t i = 0; i < bytes; i += WIDTH) {
#pragma GCC unroll 8
      for (int j = 0; j < 8 / BITS; ++j, digits += DIGITS * WIDTH) {
        const __m256i wa = values<BITS>(load(from_a + i), j), wb = values<BITS>(load(from_b + i), j);
#pragma GCC unroll 3
        for (int d = 0; d < DIGITS; ++d) {
          const __m256i digit = load(digits + d * WIDTH);
          of_a[d] = _mm256_add_epi16(of_a[d], _mm256_maddubs_epi16(wa, digit));
          of_b[d] = _mm256_add_epi16(of_b[d], _mm256_maddubs_epi16(wb, digit));
          // GCC would load what all steps need first, and have no registers for it.
          asm volatile("" : "+x"(of_a[d]), "+x"(of_b[d])::"memory");
        }
      }
    }
#pragma GCC unroll 3
    for (int d = 0; d < DIGITS; ++d) {
      sum_a = add_scaled(sum_a, of_a[d], x.scales[3 * g + d]);
      sum_b = add_scaled(sum_b, of_b[d], x.scales[3 * g + d]);
    }
  }
  sums[0] = sum_of(sum_a);
  sums[1] = sum_of(sum_b);
}

}  // namespace

bool split_digits_avx2(const float* x, int bits, const Digits& to) { return split_digits<Lane, WIDTH>(x, bits, to); }

void split_bytes_avx2(const uint8_t* bytes, int zero, int bits, const Digits& to) {
  split_bytes<Lane, WIDTH>(bytes, zero, bits, to);
}

void dot_digits_avx2(const uint8_t* const* weights, int64_t channels, int64_t row_bytes, int bits, const Digits* x,
                     int64_t rows, float* sums) {
  const auto two = bits == 1 ? dot_two<1, 2> : bits == 2 ? dot_two<2, 2> : dot_two<4, 2>;
  const auto three = bits == 1 ? dot_two<1, 3> : bits == 2 ? dot_two<2, 3> : dot_two<4, 3>;
  for (int64_t r = 0; r < rows; ++r) {
    const auto dot = x[r].count == 2 ? two : three;
    for (int64_t c = 0; c < channels; c += 2) dot(weights[c], weights[c + 1], row_bytes, x[r], sums + r * channels + c);
  }
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
