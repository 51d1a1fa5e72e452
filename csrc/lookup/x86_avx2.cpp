#include <immintrin.h>

#include <cstring>

#include "lookup/lookup.h"
#include "qconv/product.h"

namespace bitorch_engine {
namespace lookup {
namespace {

using binary::LANES;
using binary::Segment;
using binary::Tile;

constexpr int64_t SIGN_PIXELS = 4, PAIR_PIXELS = 6;  // of_signs, of_pairs

// In assembly, so that an accumulator stays where it is: GCC otherwise sums two results of lookups first, and copies
// accumulators, or runs out of registers.
inline __m256i add_in_place(__m256i sum, __m256i x) {
  asm("vpaddb %1, %0, %0" : "+x"(sum) : "x"(x));
  return sum;
}

// Sums of MR pixels times NV vectors in 16 bits. In `all` two bytes are one number; the upper one of them is counted in
// `odd` as well.
template <int MR, int NV>
struct Wide {
  __m256i all[MR][NV], odd[MR][NV];
};

// Sums of MR pixels times NV vectors in 8 bits.
template <int MR, int NV>
struct Bytes {
  __m256i of[MR][NV];
};

inline __m256i look_up(const Table& table, uint16_t entry) {
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table.values + entry)));
}

// The sums of a tile of products of 2 bits, less twice those of the upper bits. As many segments at a time as a byte
// allows. Not inlined: GCC would keep other things in the registers of the inner loop.
template <int MR, int NV>
__attribute__((noinline)) void sum_pairs(const Tile& t, const Table& table, const uint16_t* image, const uint8_t* panel,
                                         Wide<MR, NV>& wide) {
  constexpr int64_t LINE = 2 * 32 * NV;
  const int64_t step = t.image_step;
  const Segment *s = t.segments, *const end = s + t.segment_count;
  bool begin = true;
  do {
    __m256i bytes[2][MR][NV];
#pragma GCC unroll 2
    for (int bit = 0; bit < 2; ++bit)
#pragma GCC unroll 3
      for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j) bytes[bit][m][j] = _mm256_setzero_si256();
    for (int64_t left = table.longest; s < end && s->words <= left; left -= s->words, ++s) {
      const uint16_t *entries = image + s->image, *const stop = entries + s->words;
      const __m256i* weights = reinterpret_cast<const __m256i*>(panel + s->weights * LINE);
      for (; entries < stop; ++entries, weights += 2 * NV)
#pragma GCC unroll 3
        for (int m = 0; m < MR; ++m) {
          const __m256i x = look_up(table, entries[m * step]);
#pragma GCC unroll 2
          for (int bit = 0; bit < 2; ++bit)
#pragma GCC unroll 2
            for (int j = 0; j < NV; ++j) {
              const __m256i sum = _mm256_shuffle_epi8(x, _mm256_load_si256(weights + bit * NV + j));
              bytes[bit][m][j] = add_in_place(bytes[bit][m][j], sum);
            }
        }
    }
#pragma GCC unroll 3
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) {
        const __m256i one = bytes[0][m][j], two = bytes[1][m][j];
        const __m256i all = _mm256_sub_epi16(one, _mm256_add_epi16(two, two));
        const __m256i odd_two = _mm256_srli_epi16(two, 8);
        const __m256i odd = _mm256_sub_epi16(_mm256_srli_epi16(one, 8), _mm256_add_epi16(odd_two, odd_two));
        wide.all[m][j] = begin ? all : _mm256_add_epi16(wide.all[m][j], all);
        wide.odd[m][j] = begin ? odd : _mm256_add_epi16(wide.odd[m][j], odd);
      }
    begin = false;
  } while (s < end);
}

// The sums of COUNT entries of a couple of pixels, three at most: up to 12 in each half of a byte.
template <int COUNT, int NV>
inline __attribute__((always_inline)) void sum_three(const Table& table, const uint16_t* entries,
                                                     const uint8_t* weights, __m256i (&both)[NV]) {
#pragma GCC unroll 3
  for (int k = 0; k < COUNT; ++k) {
    const __m256i x = look_up(table, entries[k]);
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      const __m256i w = _mm256_load_si256(reinterpret_cast<const __m256i*>(weights) + k * NV + j);
      const __m256i sum = _mm256_shuffle_epi8(x, w);
      both[j] = k ? add_in_place(both[j], sum) : sum;
    }
  }
}

// Sums of couples of pixels: first + 16 * second, of which a byte keeps the remainder of 256, and second.
template <int COUPLES, int NV>
struct CoupleSums {
  __m256i mixed[COUPLES][NV], second[COUPLES][NV];
};

// Adds ONE and TWO entries, three at most each. The upper halves of bytes are 16 times numbers up to 12; the mean of
// two is 8 times their sum, which a byte holds.
template <int ONE, int TWO, int COUPLES, int NV>
inline __attribute__((always_inline)) void add_entries(const Table& table, const uint16_t* entries, int64_t step,
                                                       const uint8_t* weights, CoupleSums<COUPLES, NV>& sums) {
  const __m256i upper = _mm256_set1_epi8(static_cast<char>(0xf0));
#pragma GCC unroll 2
  for (int p = 0; p < COUPLES; ++p) {
    __m256i one[NV], two[NV];
    sum_three<ONE>(table, entries + 2 * p * step, weights, one);
    sum_three<TWO>(table, entries + 2 * p * step + ONE, weights + ONE * 32 * NV, two);
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      sums.mixed[p][j] = add_in_place(sums.mixed[p][j], one[j]);
      if (TWO) sums.mixed[p][j] = add_in_place(sums.mixed[p][j], two[j]);
      __m256i second = _mm256_and_si256(one[j], upper);
      if (TWO) second = _mm256_avg_epu8(second, _mm256_and_si256(two[j], upper));
      sums.second[p][j] = add_in_place(sums.second[p][j], _mm256_srli_epi16(second, TWO ? 3 : 4));
    }
  }
}

// The same of twelve entries of one couple, for which there are registers: 4 times the sum of four is the mean of two
// means.
template <int NV>
inline __attribute__((always_inline)) void add_twelve(const Table& table, const uint16_t* entries,
                                                      const uint8_t* weights, CoupleSums<1, NV>& sums) {
  const __m256i upper = _mm256_set1_epi8(static_cast<char>(0xf0));
  __m256i both[NV], mean[NV], other[NV];
  const auto take = [&](int64_t first, __m256i (&sum)[NV]) __attribute__((always_inline)) {
    sum_three<3>(table, entries + first, weights + first * 32 * NV, sum);
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) sums.mixed[0][j] = add_in_place(sums.mixed[0][j], sum[j]);
  };
  take(0, both);
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) mean[j] = _mm256_and_si256(both[j], upper);
  take(3, both);
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) mean[j] = _mm256_avg_epu8(mean[j], _mm256_and_si256(both[j], upper));
  take(6, other);
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) other[j] = _mm256_and_si256(other[j], upper);
  take(9, both);
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) {
    other[j] = _mm256_avg_epu8(other[j], _mm256_and_si256(both[j], upper));
    mean[j] = _mm256_avg_epu8(mean[j], other[j]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j)
    sums.second[0][j] = add_in_place(sums.second[0][j], _mm256_srli_epi16(mean[j], 2));
}

// Adds the sums that are 256, which a byte has as 0: what differs everywhere does so in the last entry, of segment `s`,
// too.
template <int COUPLES, int NV>
__attribute__((noinline, cold)) void add_largest(const Tile& t, const Table& table, const Segment& s,
                                                 const uint16_t* image, const uint8_t* panel,
                                                 const Bytes<2 * COUPLES, NV>& bytes, Wide<2 * COUPLES, NV>& wide) {
  const uint16_t* const entries = image + s.image + s.words - 1;
  const __m256i* const weights = reinterpret_cast<const __m256i*>(panel) + (s.weights + s.words - 1) * NV;
  for (int m = 0; m < 2 * COUPLES; ++m)
    for (int j = 0; j < NV; ++j) {
      const __m256i both = _mm256_shuffle_epi8(look_up(table, entries[m / 2 * 2 * t.image_step]), weights[j]);
      const __m256i four = _mm256_and_si256(m % 2 ? _mm256_srli_epi16(both, 4) : both, _mm256_set1_epi8(4));
      const __m256i zero = _mm256_cmpeq_epi8(bytes.of[m][j], _mm256_setzero_si256());
      const __m256i largest = _mm256_srli_epi16(_mm256_and_si256(four, zero), 2);  // 1 in each byte that is
      wide.all[m][j] = _mm256_add_epi16(wide.all[m][j], _mm256_slli_epi16(largest, 8));
      wide.odd[m][j] = _mm256_add_epi16(wide.odd[m][j], _mm256_and_si256(largest, _mm256_set1_epi16(256)));
    }
}

// As sum_pairs, for two pixels an entry.
template <int COUPLES, int NV>
__attribute__((noinline)) void sum_signs(const Tile& t, const Table& table, const uint16_t* image, const uint8_t* panel,
                                         Wide<2 * COUPLES, NV>& wide) {
  constexpr int64_t LINE = 32 * NV;
  const int64_t step = t.image_step;
  const Segment *s = t.segments, *const end = s + t.segment_count;
  bool begin = true;
  do {
    CoupleSums<COUPLES, NV> sums;
#pragma GCC unroll 2
    for (int p = 0; p < COUPLES; ++p)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) sums.mixed[p][j] = sums.second[p][j] = _mm256_setzero_si256();
    int64_t left = table.longest;
    for (; s < end && s->words <= left; left -= s->words, ++s) {
      const uint16_t *entries = image + s->image, *const stop = entries + s->words;
      const uint8_t* weights = panel + s->weights * LINE;
      if constexpr (COUPLES == 1)
        for (; stop - entries >= 12; entries += 12, weights += 12 * LINE) add_twelve(table, entries, weights, sums);
      for (; stop - entries >= 6; entries += 6, weights += 6 * LINE)
        add_entries<3, 3>(table, entries, step, weights, sums);
      for (; stop - entries >= 4; entries += 4, weights += 4 * LINE)
        add_entries<3, 1>(table, entries, step, weights, sums);
      for (; entries < stop; ++entries, weights += LINE) add_entries<1, 0>(table, entries, step, weights, sums);
    }
    Bytes<2 * COUPLES, NV> bytes;
    __m256i least = _mm256_set1_epi8(-1);
#pragma GCC unroll 2
    for (int p = 0; p < COUPLES; ++p)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        const __m256i second = sums.second[p][j], upper = _mm256_set1_epi8(static_cast<char>(0xf0));
        const __m256i sixteen = _mm256_and_si256(_mm256_slli_epi16(second, 4), upper);
        const __m256i first = _mm256_sub_epi8(sums.mixed[p][j], sixteen);
        least = _mm256_min_epu8(least, _mm256_min_epu8(first, second));
        bytes.of[2 * p][j] = first;
        bytes.of[2 * p + 1][j] = second;
      }
#pragma GCC unroll 4
    for (int m = 0; m < 2 * COUPLES; ++m)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        const __m256i all = bytes.of[m][j], odd = _mm256_srli_epi16(all, 8);
        wide.all[m][j] = begin ? all : _mm256_add_epi16(wide.all[m][j], all);
        wide.odd[m][j] = begin ? odd : _mm256_add_epi16(wide.odd[m][j], odd);
      }
    if (left == 0 && _mm256_movemask_epi8(_mm256_cmpeq_epi8(least, _mm256_setzero_si256()))) {
      const Bytes<2 * COUPLES, NV> copy = bytes;  // or all of them would be in memory, always
      add_largest<COUPLES, NV>(t, table, s[-1], image, panel, copy, wide);
    }
    begin = false;
  } while (s < end);
}

// Calls write(pixel, channel, start + sums of eight channels, each with `upper` above it). start: so that all are 0 to
// 65535.
template <int start, int MR, int NV, class Write>
inline __attribute__((always_inline)) void for_each_eight(const Wide<MR, NV>& wide, int64_t count, int64_t blocks,
                                                         int times, __m256i upper, const Write& write) {
  const __m256i first = _mm256_set1_epi16(static_cast<int16_t>(start));
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) {
    if (m == count) break;
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      __m256i odd = wide.odd[m][j], even = _mm256_sub_epi16(wide.all[m][j], _mm256_slli_epi16(odd, 8));
      if (start) {
        odd = _mm256_add_epi16(odd, first);
        even = _mm256_add_epi16(even, first);
      }
      if (times == 2) {
        odd = _mm256_add_epi16(odd, odd);
        even = _mm256_add_epi16(even, even);
      }
      write(m, 32 * j, _mm256_unpacklo_epi16(even, upper));
      write(m, 32 * j + 8, _mm256_unpackhi_epi16(even, upper));
      if (j + 1 == NV && blocks < 2 * NV) continue;
      write(m, 32 * j + 16, _mm256_unpacklo_epi16(odd, upper));
      write(m, 32 * j + 24, _mm256_unpackhi_epi16(odd, upper));
    }
  }
}

template <int MR, int NV>
using SumFunction = void (*)(const Tile& t, const Table& table, const uint16_t* image, const uint8_t* panel,
                             Wide<MR, NV>& wide);

template <bool are_signs, int MR, int NV, SumFunction<MR, NV> sums_of>
void tile(const Tile& t, const Table& table, const uint16_t* image, const uint8_t* panel) {
  Wide<MR, NV> wide;
  // Copies: for all GCC knows, a store of results changes the tile.
  float* const out = t.out;
  const float *const factor = t.factor, *const added = t.added;
  const int64_t out_step = t.out_step, count = t.count, blocks = t.blocks;
  sums_of(t, table, image, panel, wide);
  // What of a total does not change: the total is this less twice the sum of signs, or and the sum of pairs.
  constexpr int start = are_signs ? 0 : PAIRS_START, times = are_signs ? 2 : 1;
  const int32_t constant = t.products - start;
  if (int32_t* const totals = t.totals) {
    const __m256i from = _mm256_set1_epi32(constant);
    for_each_eight<start>(wide, count, blocks, times, _mm256_setzero_si256(), [&](int m, int64_t o, __m256i sum) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(totals + m * COLUMNS + o),
                          are_signs ? _mm256_sub_epi32(from, sum) : _mm256_add_epi32(from, sum));
    });
    return;
  }
  // With this above it a word is a float, 2**23 + the word. Every number up to 2**24 is exact here: only the last two
  // operations round, and without `added` only the first one.
  const __m256i exponent = _mm256_set1_epi16(0x4b00);
  const __m256 from = _mm256_set1_ps(static_cast<float>(are_signs ? (1 << 23) + constant : (1 << 23) - constant));
  const auto scaled = [&](int64_t o, __m256i sum) {
    const __m256 number = _mm256_castsi256_ps(sum);
    const __m256 total = are_signs ? _mm256_sub_ps(from, number) : _mm256_sub_ps(number, from);
    return _mm256_mul_ps(total, _mm256_loadu_ps(factor + o));
  };
  if (added)
    for_each_eight<start>(wide, count, blocks, times, exponent, [&](int m, int64_t o, __m256i sum) {
      const __m256 value = _mm256_add_ps(scaled(o, sum), _mm256_loadu_ps(added + o));
      _mm256_storeu_ps(out + m * out_step + o, value);
    });
  else
    for_each_eight<start>(wide, count, blocks, times, exponent, [&](int m, int64_t o, __m256i sum) {
      _mm256_storeu_ps(out + m * out_step + o, scaled(o, sum));
    });
}

using TileFunction = void (*)(const Tile& t, const Table& table, const uint16_t* image, const uint8_t* panel);

}  // namespace

void signs_avx2(const Tile& t, const Table& table, const uint16_t* image, const uint8_t* panel) {
  constexpr TileFunction TILES[SIGN_PIXELS / 2][2] = {
      {tile<true, 2, 1, sum_signs<1, 1>>, tile<true, 2, 2, sum_signs<1, 2>>},
      {tile<true, 4, 1, sum_signs<2, 1>>, tile<true, 4, 2, sum_signs<2, 2>>}};
  if (t.blocks <= binary::MOST_BLOCKS) return TILES[(t.count - 1) / 2][t.blocks > 2](t, table, image, panel);
  // Of four vectors there are registers for one couple.
  Tile couple = t;
  for (; couple.count > 0; couple.count -= 2, couple.out += 2 * t.out_step, image += 2 * t.image_step)
    tile<true, 2, 4, sum_signs<1, 4>>(couple, table, image, panel);
}

// Halves, for which there are registers.
void pairs_avx2(const Tile& t, const Table& table, const uint16_t* image, const uint8_t* panel) {
  constexpr TileFunction TILES[PAIR_PIXELS / 2][2] = {
      {tile<false, 1, 1, sum_pairs<1, 1>>, tile<false, 1, 2, sum_pairs<1, 2>>},
      {tile<false, 2, 1, sum_pairs<2, 1>>, tile<false, 2, 2, sum_pairs<2, 2>>},
      {tile<false, 3, 1, sum_pairs<3, 1>>, tile<false, 3, 2, sum_pairs<3, 2>>}};
  Tile half = t;
  for (int64_t done = 0; done < t.count; done += half.count) {
    half.count = done || t.count <= PAIR_PIXELS / 2 ? t.count - done : t.count / 2;
    TILES[half.count - 1][t.blocks > 2](half, table, image + done * t.image_step, panel);
    half.out += half.count * t.out_step;
    if (t.totals) half.totals += half.count * COLUMNS;
  }
}

void turn_avx2(const float* rows, int64_t pixels, int64_t channels, float* out, int64_t step, int64_t plane) {
  constexpr int64_t AT_ONCE = 32;  // pixels, whose rows stay in the L1 cache
  for (; pixels > AT_ONCE; pixels -= AT_ONCE, rows += AT_ONCE * COLUMNS, out += AT_ONCE * step)
    turn_avx2(rows, AT_ONCE, channels, out, step, plane);
  for (int64_t o = 0; o < channels; o += 4, rows += 4, out += 4 * plane) {
    int64_t p = 0;
    for (; step == 1 && p + 8 <= pixels; p += 8) {
      __m256 r[4], pairs[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const float* row = rows + (p + i) * COLUMNS;
        r[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(row)), _mm_loadu_ps(row + 4 * COLUMNS), 1);
      }
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        pairs[i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        pairs[i + 2] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
      }
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c)
        _mm256_storeu_ps(out + c * plane + p, _mm256_shuffle_ps(pairs[c & 2], pairs[(c & 2) + 1], c % 2 ? 0xee : 0x44));
    }
    for (; p < pixels; ++p)
      for (int64_t c = 0; c < 4; ++c) out[c * plane + p * step] = rows[p * COLUMNS + c];
  }
}

namespace {

inline uint16_t table_of(int bits) { return static_cast<uint16_t>(bits * 16); }

// Whole words of runs are one run.
inline void join_runs(int64_t& runs, int64_t& bits) {
  if (bits % binary::WORD) return;
  bits *= runs;
  runs = 1;
}

inline int64_t bytes_in_words(int64_t bits) { return (bits + binary::WORD - 1) / binary::WORD * 4; }

}  // namespace

void sign_entries_avx2(const uint32_t* words, const uint32_t* seconds, int64_t runs, int64_t bits, uint16_t* out) {
  join_runs(runs, bits);
  const int64_t count = bytes_of(bits), bytes = bytes_in_words(bits);
  const uint8_t *x = reinterpret_cast<const uint8_t*>(words), *y = reinterpret_cast<const uint8_t*>(seconds);
  const __m128i lower = _mm_set1_epi8(15), upper = _mm_set1_epi8(static_cast<char>(0xf0));
  for (int64_t run = 0; run < runs; ++run, x += bytes, y += bytes, out += 2 * count) {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
      const __m128i one = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i));
      const __m128i two = _mm_loadu_si128(reinterpret_cast<const __m128i*>(y + i));
      const __m128i even = _mm_or_si128(_mm_and_si128(one, lower), _mm_and_si128(_mm_slli_epi16(two, 4), upper));
      const __m128i odd = _mm_or_si128(_mm_and_si128(_mm_srli_epi16(one, 4), lower), _mm_and_si128(two, upper));
      const auto store = [&](int64_t at, __m128i tables) {
        const __m256i offsets = _mm256_slli_epi16(_mm256_cvtepu8_epi16(tables), 4);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + at), offsets);
      };
      store(2 * i, _mm_unpacklo_epi8(even, odd));
      store(2 * i + 16, _mm_unpackhi_epi8(even, odd));
    }
    for (; i < count; ++i) {
      out[2 * i] = table_of((x[i] & 15) | (y[i] & 15) << 4);
      out[2 * i + 1] = table_of(x[i] >> 4 | (y[i] & 240));
    }
  }
}

void pair_entries_avx2(const uint32_t* words, const uint32_t*, int64_t runs, int64_t bits, uint16_t* out) {
  join_runs(runs, bits);
  const int64_t count = bytes_of(bits), bytes = bytes_in_words(bits);
  const uint8_t* from = reinterpret_cast<const uint8_t*>(words);
  for (int64_t run = 0; run < runs; ++run, from += bytes, out += count)
    for (int64_t i = 0; i < count; ++i) out[i] = table_of(from[i]);
}

namespace {

// Of eight lanes of two blocks: [lane % 4, of all four bytes of its word: (first, second block)], and so in each
// half of a vector. lower: bytes 0 and 1 of the words, upper: 2 and 3.
inline void transpose_bytes(const uint32_t* first, const uint32_t* second, __m256i& lower, __m256i& upper) {
  const __m256i by_byte =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
  const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first));
  const __m256i b = second ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)) : _mm256_setzero_si256();
  const __m256i lanes01 = _mm256_shuffle_epi8(_mm256_unpacklo_epi8(a, b), by_byte);
  const __m256i lanes23 = _mm256_shuffle_epi8(_mm256_unpackhi_epi8(a, b), by_byte);
  lower = _mm256_unpacklo_epi32(lanes01, lanes23);
  upper = _mm256_unpackhi_epi32(lanes01, lanes23);
}

}  // namespace

void panel_avx2(const uint32_t* weights, int64_t block_words, int64_t blocks, int64_t taps, int64_t bits,
                uint8_t* out) {
  const int64_t words = (bits + binary::WORD - 1) / binary::WORD, vectors = (blocks + 1) / 2;
  const __m256i four = _mm256_set1_epi8(15);
  for (int64_t t = 0; t < taps; ++t)
    for (int64_t k = 0; k < words; ++k) {
      const int64_t entries = k + 1 < words ? 4 : bytes_of(bits - k * binary::WORD);
      for (int64_t j = 0; j < vectors; ++j) {
        const uint32_t* first = weights + 2 * j * block_words + (t * words + k) * LANES;
        const uint32_t* second = 2 * j + 1 < blocks ? first + block_words : nullptr;
        __m256i low[2], high[2];  // of lanes 0 to 7, 8 to 15
        transpose_bytes(first, second, low[0], high[0]);
        transpose_bytes(first + 8, second ? second + 8 : nullptr, low[1], high[1]);
        const __m256i bytes[4] = {_mm256_unpacklo_epi64(low[0], low[1]), _mm256_unpackhi_epi64(low[0], low[1]),
                                  _mm256_unpacklo_epi64(high[0], high[1]), _mm256_unpackhi_epi64(high[0], high[1])};
        for (int64_t e = 0; e < entries; ++e) {
          __m256i* to = reinterpret_cast<__m256i*>(out) + e * 2 * vectors + j;
          _mm256_store_si256(to, _mm256_and_si256(bytes[e], four));
          _mm256_store_si256(to + vectors, _mm256_and_si256(_mm256_srli_epi16(bytes[e], 4), four));
        }
      }
      out += entries * 2 * vectors * 32;
    }
}

}  // namespace lookup
}  // namespace bitorch_engine
