#include <immintrin.h>

#include <cstring>

#include "qconv/product.h"
#include "winograd/gradient.h"
#include "winograd/winograd.h"

namespace bitorch_engine {
namespace winograd {
namespace {

__m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
void store(void* to, __m256i value) { _mm256_storeu_si256(static_cast<__m256i*>(to), value); }

// sum += product. Left to itself the compiler multiplies all first, adds later, and spills every product.
inline void add(__m256i& sum, __m256i product) { __asm__ volatile("vpaddd %1, %0, %0" : "+x"(sum) : "x"(product)); }

// G, of 16 numbers of 16 bits at a time.
inline void filter(__m256i a, __m256i b, __m256i c, __m256i (&out)[READ]) {
  const __m256i ends = _mm256_add_epi16(a, c), far = _mm256_add_epi16(a, _mm256_slli_epi16(c, 2));
  const __m256i twice = _mm256_add_epi16(b, b);
  out[0] = _mm256_add_epi16(a, _mm256_add_epi16(a, a));
  out[1] = _mm256_add_epi16(ends, b);
  out[2] = _mm256_sub_epi16(ends, b);
  out[3] = _mm256_add_epi16(far, twice);
  out[4] = _mm256_sub_epi16(far, twice);
  out[5] = _mm256_add_epi16(c, _mm256_add_epi16(c, c));
}

// B, of 16 numbers of 16 bits at a time.
inline void spread(const __m256i (&u)[READ], __m256i (&out)[READ]) {
  const __m256i a = _mm256_sub_epi16(u[4], _mm256_slli_epi16(u[2], 2));
  const __m256i b = _mm256_sub_epi16(u[3], _mm256_slli_epi16(u[1], 2));
  const __m256i c = _mm256_sub_epi16(u[4], u[2]), d = _mm256_sub_epi16(u[3], u[1]), twice = _mm256_add_epi16(d, d);
  out[0] = _mm256_add_epi16(_mm256_sub_epi16(a, u[2]), _mm256_slli_epi16(u[0], 2));
  out[1] = _mm256_add_epi16(a, b);
  out[2] = _mm256_sub_epi16(a, b);
  out[3] = _mm256_add_epi16(c, twice);
  out[4] = _mm256_sub_epi16(c, twice);
  out[5] = _mm256_sub_epi16(_mm256_sub_epi16(u[5], u[3]), _mm256_add_epi16(twice, twice));
}

// A without the factors of SHIFT, of 8 numbers of 32 bits at a time.
inline void gather(const __m256i (&m)[READ], __m256i (&out)[SIDE]) {
  const __m256i near = _mm256_add_epi32(m[1], m[2]), far = _mm256_add_epi32(m[3], m[4]);
  const __m256i left = _mm256_sub_epi32(m[1], m[2]), right = _mm256_sub_epi32(m[3], m[4]);
  const __m256i some = _mm256_sub_epi32(m[0], _mm256_add_epi32(near, near)), all = _mm256_add_epi32(right, m[5]);
  out[0] = _mm256_add_epi32(_mm256_add_epi32(some, some), far);
  out[1] = _mm256_sub_epi32(right, _mm256_add_epi32(left, left));
  out[2] = _mm256_sub_epi32(far, near);
  out[3] = _mm256_sub_epi32(_mm256_add_epi32(all, all), left);
}

// G of the weight's gradient, of 16 numbers of 16 bits at a time.
inline void filter(__m256i a, __m256i b, __m256i c, __m256i d, __m256i (&out)[READ]) {
  const __m256i ends = _mm256_add_epi16(a, c), far = _mm256_add_epi16(a, _mm256_slli_epi16(c, 2));
  const __m256i odd = _mm256_add_epi16(b, d);
  const __m256i twice = _mm256_add_epi16(_mm256_add_epi16(b, b), _mm256_slli_epi16(d, 3));
  out[0] = _mm256_add_epi16(a, _mm256_add_epi16(a, a));
  out[1] = _mm256_add_epi16(ends, odd);
  out[2] = _mm256_sub_epi16(ends, odd);
  out[3] = _mm256_add_epi16(far, twice);
  out[4] = _mm256_sub_epi16(far, twice);
  out[5] = _mm256_add_epi16(d, _mm256_add_epi16(d, d));
}

// A of the weight's gradient, without the factors of SHIFT, of 8 numbers of 32 bits at a time.
inline void gather(const __m256i (&m)[READ], __m256i (&out)[3]) {
  const __m256i near = _mm256_add_epi32(m[1], m[2]), far = _mm256_add_epi32(m[3], m[4]);
  const __m256i left = _mm256_sub_epi32(m[1], m[2]), right = _mm256_sub_epi32(m[3], m[4]);
  const __m256i some = _mm256_sub_epi32(m[0], _mm256_add_epi32(near, near));
  out[0] = _mm256_add_epi32(_mm256_add_epi32(some, some), far);
  out[1] = _mm256_sub_epi32(right, _mm256_add_epi32(left, left));
  out[2] = _mm256_add_epi32(_mm256_sub_epi32(far, near), _mm256_add_epi32(m[5], m[5]));
}

// B u B^T of 16 channels: put(place, numbers) takes each of the 36.
template <class Load, class Put>
inline void spread_tile(const Load& pixel, const Put& put) {
  __m256i lined[READ][READ], one[READ], of[READ];
  for (int i = 0; i < READ; ++i) {
#pragma GCC unroll 6
    for (int j = 0; j < READ; ++j) one[j] = pixel(i, j);
    spread(one, lined[i]);
  }
  for (int j = 0; j < READ; ++j) {
#pragma GCC unroll 6
    for (int i = 0; i < READ; ++i) one[i] = lined[i][j];
    spread(one, of);
#pragma GCC unroll 6
    for (int i = 0; i < READ; ++i) put(i * READ + j, of[i]);
  }
}

// 16 bytes, those in the middle swapped by fours: then unpacking within 128 bits gives the order of the channels.
inline __m128i load_for_unpacking(const void* from) {
  return _mm_shuffle_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from)), 0xd8);
}

// Numbers of two tiles side by side.
inline void store_pair(int16_t* to, __m256i first, __m256i second) {
  store(to, _mm256_unpacklo_epi16(first, second));
  store(to + 16, _mm256_unpackhi_epi16(first, second));
}

// Four results times 16 channels, one of the 36.
void multiply_four(const int16_t* gradients, const int16_t* pixels, int64_t pairs, int32_t* sums) {
  __m256i sum[4][2];
#pragma GCC unroll 4
  for (int m = 0; m < 4; ++m) sum[m][0] = sum[m][1] = _mm256_setzero_si256();
  for (int64_t t = 0; t < pairs; ++t, gradients += 2 * UNIT, pixels += 2 * UNIT) {
    const __m256i left = load(pixels), right = load(pixels + UNIT);
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) {
      int two;
      __builtin_memcpy(&two, gradients + 2 * m, 4);
      const __m256i g = _mm256_set1_epi32(two);
      add(sum[m][0], _mm256_madd_epi16(g, left));
      add(sum[m][1], _mm256_madd_epi16(g, right));
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < 4; ++m) {
    store(sums + m * UNIT, sum[m][0]);
    store(sums + m * UNIT + 8, sum[m][1]);
  }
}

// Four channels of 16 results to pairs of channels: results 0 .. 7 and 8 .. 15 of the first pair, then of the second.
void pair_channels(const int8_t* from, __m256i (&out)[4]) {
  const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15,  //
                                         0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
  for (int half = 0; half < 2; ++half) {
    // [results 0 .. 3: pair 0, pair 1 | results 4 .. 7: the same] to [pair 0 | pair 1]
    const __m256i pairs = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(load(from + 32 * half), order), 0xd8);
    out[half] = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(pairs));
    out[2 + half] = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(pairs, 1));
  }
}

// MR tiles times one block, one of the 36: 2 * MR sums, two vectors of weights, a pixel and a product are in registers.
template <int MR>
void multiply_few(const int16_t* pixels, const int16_t* weights, int64_t depth, bool added, int32_t* sums) {
  __m256i sum[MR][2];
#pragma GCC unroll 6
  for (int m = 0; m < MR; ++m)
    for (int j = 0; j < 2; ++j) sum[m][j] = added ? load(sums + m * BLOCK + 8 * j) : _mm256_setzero_si256();
  for (int64_t c = 0; c < depth; c += 2, weights += 2 * BLOCK) {
    const __m256i left = load(weights), right = load(weights + BLOCK);
#pragma GCC unroll 6
    for (int m = 0; m < MR; ++m) {
      int two;
      __builtin_memcpy(&two, pixels + m * depth + c, 4);
      const __m256i x = _mm256_set1_epi32(two);
      add(sum[m][0], _mm256_madd_epi16(x, left));
      add(sum[m][1], _mm256_madd_epi16(x, right));
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < MR; ++m) {
    store(sums + m * BLOCK, sum[m][0]);
    store(sums + m * BLOCK + 8, sum[m][1]);
  }
}

constexpr int64_t TOGETHER = 6;  // tiles
using FewFunction = void (*)(const int16_t*, const int16_t*, int64_t, bool, int32_t*);
constexpr FewFunction FEW[TOGETHER] = {multiply_few<1>, multiply_few<2>, multiply_few<3>,
                                       multiply_few<4>, multiply_few<5>, multiply_few<6>};

}  // namespace

void weights_avx2(const int8_t* block, int64_t step, int64_t depth, int64_t padded, int16_t* out) {
  const int64_t pitch = pitch_of(padded * BLOCK);
  for (int64_t c = 0; c < depth; c += 4, block += 4 * BLOCK, out += 4 * BLOCK) {
    __m256i taps[9][4];
    for (int t = 0; t < 9; ++t) pair_channels(block + t * step, taps[t]);
    for (int v = 0; v < 4; ++v) {
      __m256i rows[READ][3], one[READ];
      for (int j = 0; j < 3; ++j) {
        filter(taps[j][v], taps[3 + j][v], taps[6 + j][v], one);
        for (int i = 0; i < READ; ++i) rows[i][j] = one[i];
      }
      for (int i = 0; i < READ; ++i) {
        filter(rows[i][0], rows[i][1], rows[i][2], one);
        for (int j = 0; j < READ; ++j) store(out + (i * READ + j) * pitch + v * BLOCK, one[j]);
      }
    }
  }
  if (depth < padded)
    for (int64_t i = 0; i < PLACES; ++i) std::memset(out + i * pitch, 0, (padded - depth) * BLOCK * sizeof *out);
}

void pixels_avx2(const uint8_t* const* lines, const int64_t* columns, int64_t depth, int16_t* out, int64_t pitch) {
  for (int64_t c = 0; c < depth; c += UNIT, out += UNIT)
    spread_tile(
        [=](int i, int j) {
          return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(lines[i] + columns[j] + c)));
        },
        [=](int place, __m256i numbers) { store(out + place * pitch, numbers); });
}

void multiply_avx2(const int16_t* pixels, int64_t pitch, const int16_t* weights, int64_t tiles, int64_t depth,
                   bool added, int32_t* sums) {
  for (int64_t i = 0; i < PLACES; ++i, pixels += pitch, weights += pitch_of(depth * BLOCK))
    for (int64_t t = 0; t < tiles;) {
      const int64_t few = tiles - t < TOGETHER ? tiles - t : TOGETHER;
      FEW[few - 1](pixels + t * depth, weights, depth, added, sums);
      t += few;
      sums += few * BLOCK;
    }
}

void totals_avx2(const int32_t* sums, int64_t tiles, int64_t first, int64_t count, bool added, int32_t* totals) {
  const __m256i inverse = _mm256_set1_epi32(INVERSE_OF_9);
  const int64_t pitch = tiles * BLOCK, line = SIDE * count * COLUMNS;
  sums += first * BLOCK;
  for (int64_t t = 0; t < count; ++t, sums += BLOCK, totals += SIDE * COLUMNS)
    for (int64_t o = 0; o < BLOCK; o += 8) {
      __m256i lined[SIDE][READ], one[READ], of[SIDE];
      for (int j = 0; j < READ; ++j) {
#pragma GCC unroll 6
        for (int i = 0; i < READ; ++i) one[i] = load(sums + (i * READ + j) * pitch + o);
        gather(one, of);
#pragma GCC unroll 4
        for (int y = 0; y < SIDE; ++y) lined[y][j] = of[y];
      }
#pragma GCC unroll 4
      for (int y = 0; y < SIDE; ++y) {
        gather(lined[y], of);
#pragma GCC unroll 4
        for (int x = 0; x < SIDE; ++x) {
          int32_t* const to = totals + y * line + x * COLUMNS + o;
          const __m256i total = _mm256_srai_epi32(_mm256_mullo_epi32(of[x], inverse), 6 - SHIFT[y] - SHIFT[x]);
          store(to, added ? _mm256_add_epi32(load(to), total) : total);
        }
      }
    }
}

void pixel_pair_avx2(const uint8_t* const (*lines)[READ], const int64_t (*columns)[READ], int16_t* out, int64_t pitch) {
  __m256i first[PLACES];
  const auto pixel = [=](int t, int i, int j) {
    return _mm256_cvtepu8_epi16(load_for_unpacking(lines[t][i] + columns[t][j]));
  };
  spread_tile([&](int i, int j) { return pixel(0, i, j); },
              [&](int place, __m256i numbers) { first[place] = numbers; });
  spread_tile([&](int i, int j) { return pixel(1, i, j); },
              [&](int place, __m256i numbers) { store_pair(out + place * pitch, first[place], numbers); });
}

void gradient_pair_avx2(const int8_t (*gradients)[SQUARE][UNIT], int16_t* out, int64_t pitch) {
  __m256i of[2][PLACES], one[READ], lined[READ][SIDE];
  for (int t = 0; t < 2; ++t) {
    const auto g = [=](int i, int j) { return _mm256_cvtepi8_epi16(load_for_unpacking(gradients[t][i * SIDE + j])); };
    for (int j = 0; j < SIDE; ++j) {
      filter(g(0, j), g(1, j), g(2, j), g(3, j), one);
      for (int i = 0; i < READ; ++i) lined[i][j] = one[i];
    }
    for (int i = 0; i < READ; ++i) {
      filter(lined[i][0], lined[i][1], lined[i][2], lined[i][3], one);
      for (int j = 0; j < READ; ++j) of[t][i * READ + j] = one[j];
    }
  }
  for (int i = 0; i < PLACES; ++i) store_pair(out + i * pitch, of[0][i], of[1][i]);
}

void multiply_pairs_avx2(const int16_t* gradients, const int16_t* pixels, int64_t pairs, int64_t pitch, int32_t* sums) {
  for (int64_t i = 0; i < PLACES; ++i, gradients += pitch, pixels += pitch)
    for (int64_t o = 0; o < UNIT; o += 4, sums += 4 * UNIT) multiply_four(gradients + 2 * o, pixels, pairs, sums);
}

void taps_avx2(const int32_t* sums, int32_t* taps) {
  const __m256i inverse = _mm256_set1_epi32(INVERSE_OF_9);
  for (int64_t o = 0; o < UNIT; ++o, sums += UNIT, taps += TAPS * UNIT)
    for (int64_t c = 0; c < UNIT; c += 8) {
      __m256i lined[3][READ], one[READ], of[3];
      for (int j = 0; j < READ; ++j) {
#pragma GCC unroll 6
        for (int i = 0; i < READ; ++i) one[i] = load(sums + (i * READ + j) * UNIT * UNIT + c);
        gather(one, of);
#pragma GCC unroll 3
        for (int y = 0; y < 3; ++y) lined[y][j] = of[y];
      }
#pragma GCC unroll 3
      for (int y = 0; y < 3; ++y) {
        gather(lined[y], of);
#pragma GCC unroll 3
        for (int x = 0; x < 3; ++x)
          store(taps + (y * 3 + x) * UNIT + c,
                _mm256_srai_epi32(_mm256_mullo_epi32(of[x], inverse), 6 - SHIFT[y] - SHIFT[x]));
      }
    }
}

}  // namespace winograd
}  // namespace bitorch_engine
