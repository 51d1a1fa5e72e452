#include <immintrin.h>

#include "linear/digits.h"
#include "linear/linear.h"
#include "qconv/qconv.h"

namespace bitorch_engine {
namespace {

constexpr int64_t WIDTH = 32;
constexpr int64_t AHEAD = 1024;  // bytes of a row that are asked for before they are needed
constexpr int TILE = 2;           // rows of weights whose sums, and what they need, have registers

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

// The sums of four vectors each.
inline __m128 sums_of(const __m256* v) {
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  return _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
}

// A piece of TILE rows of weights, `bytes` of each, which zeros fill up to whole vectors: products of codes and digits
// are added to sums that begin with the corrections, and these become floats.
template <int BITS, int DIGITS>
__attribute__((always_inline)) inline void multiply_piece(const uint8_t* const* weights, int64_t bytes,
                                                          const int8_t* digits, const uint8_t* corrections,
                                                          const float* scales, __m256* parts) {
  __m256i sums[TILE][DIGITS];
#pragma GCC unroll 2
  for (int c = 0; c < TILE; ++c)
#pragma GCC unroll 4
    for (int d = 0; d < DIGITS; ++d) sums[c][d] = load(corrections + d * WIDTH);
#pragma GCC unroll 1
  for (int64_t i = 0; i < bytes; i += WIDTH) {
#pragma GCC unroll 8
    for (int j = 0; j < 8 / BITS; ++j, digits += DIGITS * WIDTH) {
      __m256i digit[DIGITS];
#pragma GCC unroll 4
      for (int d = 0; d < DIGITS; ++d) digit[d] = load(digits + d * WIDTH);
#pragma GCC unroll 2
      for (int c = 0; c < TILE; ++c) {
        const __m256i value = values<BITS>(load(weights[c] + i), j);
#pragma GCC unroll 4
        for (int d = 0; d < DIGITS; ++d) {
          sums[c][d] = _mm256_add_epi16(sums[c][d], _mm256_maddubs_epi16(value, digit[d]));
          // GCC would first add products to each other, and have no registers for all of them.
          asm("" : "+x"(sums[c][d]));
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int c = 0; c < TILE; ++c) {
    parts[c] = _mm256_setzero_ps();
#pragma GCC unroll 4
    for (int d = 0; d < DIGITS; ++d) {
      const __m256i fours = _mm256_madd_epi16(sums[c][d], _mm256_set1_epi16(1));
      parts[c] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(fours), _mm256_set1_ps(scales[d]), parts[c]);
    }
  }
}

// CHANNELS rows of weights. GROUPED: whether they have scales.
template <int BITS, int DIGITS, bool GROUPED>
void multiply_rows(const uint8_t* const* weights, const float* const* weight_scales, int64_t row_bytes,
                   const Digits& x, float* sums) {
  const int64_t piece = GROUPED ? piece_columns(x.group, BITS, WIDTH) : GROUP, piece_bytes = piece * BITS / 8;
  // Groups of a piece, which are several where a vector has more columns than a group, and that of each lane.
  const int groups = GROUPED && x.group < piece ? static_cast<int>(piece / x.group) : 1;
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i group = _mm256_srli_epi32(_mm256_mullo_epi32(lanes, _mm256_set1_epi32(groups)), 3);
  __m256i present = _mm256_cmpgt_epi32(_mm256_set1_epi32(groups), lanes);
  __m256 totals[CHANNELS];
#pragma GCC unroll 4
  for (int c = 0; c < CHANNELS; ++c) totals[c] = _mm256_setzero_ps();
  const int8_t* digits = x.digits;
  const uint8_t* corrections = x.corrections;
  uint8_t last[CHANNELS][GROUP * BITS / 8];
  for (int64_t start = 0; start < row_bytes; start += piece_bytes) {
    const uint8_t* from[CHANNELS];
#pragma GCC unroll 4
    for (int c = 0; c < CHANNELS; ++c) from[c] = weights[c] + start;
#pragma GCC unroll 4
    for (int c = 0; c < CHANNELS; ++c)
      for (int64_t line = start % 64; line < piece_bytes; line += 64) __builtin_prefetch(from[c] + line + AHEAD, 0, 2);
    const int64_t left = row_bytes - start;
    if (left < piece_bytes && left % WIDTH) {  // what follows is another row, or not there
      __builtin_memset(last, 0, sizeof last);
      for (int c = 0; c < CHANNELS; ++c) {
        __builtin_memcpy(last[c], from[c], left);
        from[c] = last[c];
      }
      if (groups > 1)
        present = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(left * 8 / BITS / x.group)), lanes);
    }
    const int64_t column = start * 8 / BITS;
    const float* scales = x.scales + column / GROUP * DIGITS;
    __m256 parts[CHANNELS];
#pragma GCC unroll 2
    for (int c = 0; c < CHANNELS; c += TILE) {
      // Where the compiler knows how long a piece is, it takes a third less time.
      if (left < piece_bytes)
        multiply_piece<BITS, DIGITS>(from + c, left, digits, corrections, scales, parts + c);
      else
        multiply_piece<BITS, DIGITS>(from + c, piece_bytes, digits, corrections, scales, parts + c);
    }
#pragma GCC unroll 4
    for (int c = 0; c < CHANNELS; ++c) {
      if (GROUPED) {
        const __m256 some = _mm256_maskload_ps(weight_scales[c] + column / x.group, present);
        totals[c] = _mm256_fmadd_ps(parts[c], _mm256_permutevar8x32_ps(some, group), totals[c]);
      } else {
        totals[c] = _mm256_add_ps(totals[c], parts[c]);
      }
    }
    digits += piece * DIGITS;
    corrections += DIGITS * WIDTH;
  }
  _mm_storeu_ps(sums, sums_of(totals));
}

template <int BITS, int DIGITS>
void multiply_fours(const WeightRows& weights, const Digits& x, float* sums) {
  for (int64_t c = 0; c < weights.count; c += CHANNELS) {
    if (weights.scales)
      multiply_rows<BITS, DIGITS, true>(weights.packed + c, weights.scales + c, weights.row_bytes, x, sums + c);
    else
      multiply_rows<BITS, DIGITS, false>(weights.packed + c, nullptr, weights.row_bytes, x, sums + c);
  }
}

// Where 16 packed values are in 16 bytes, and how they become floats without a conversion. A value stays where it lies,
// `offset` bits up in two bytes, and these are the lower half of a float whose exponent is less by so much: it then is
// 2**(23 - offset) + value.
struct alignas(32) Positions {
  uint8_t bytes[32];      // two that hold the value; words lie so that they unpack in order
  uint16_t masks[16];     // the bits of the value in them
  uint16_t exponents[16]; // upper halves of the floats
  float lows[8];          // what the float of the code 0 is

  constexpr explicit Positions(int bits) : bytes(), masks(), exponents(), lows() {
    for (int word = 0; word < 16; ++word) {
      const int column = word / 8 * 4 + word % 8 + word % 8 / 4 * 4, byte = column * bits / 8;
      // Of 1 bit the float is twice the value. There a byte is the upper one of two, so that 1 can be added exactly.
      const int offset = column * bits % 8 + (bits == 1 ? 8 : 0), exponent = 23 - offset + (bits == 1);
      bytes[2 * word] = static_cast<uint8_t>(bits == 1 ? 0x80 : byte);
      bytes[2 * word + 1] = static_cast<uint8_t>(bits == 1 ? byte : byte < 15 ? byte + 1 : 0x80);
      masks[word] = static_cast<uint16_t>(((1 << bits) - 1) << offset);
      exponents[word] = static_cast<uint16_t>((127 + exponent) << 7);
      lows[column % 8] = static_cast<float>((1 << exponent) - lowest_code(bits));
    }
  }
};
constexpr Positions POSITIONS[8] = {Positions(1), Positions(2), Positions(3), Positions(4),
                                    Positions(5), Positions(6), Positions(7), Positions(8)};

// 16 columns each: so many from number `first` of C rows of weights and R of floats, which begin with that one. `piece`
// have one scale.
struct Run {
  const uint8_t* const* weights;
  const float* const* scales;  // or null
  const float* const* x;
  int bits;
  int64_t first, count, piece;
};

// Adds the products to totals[c * R + r].
template <int C, int R>
__attribute__((noinline)) void add_blocks(const Run& run, __m256* totals) {
  const Positions& at = POSITIONS[run.bits - 1];
  const __m256i bytes = load(at.bytes), masks = load(at.masks), exponents = load(at.exponents);
  const __m256 lows = _mm256_load_ps(at.lows);
  const uint8_t* from[C];
  const float* x[R];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) from[c] = run.weights[c];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) x[r] = run.x[r];
  const int64_t stride = 2 * run.bits;
  for (int64_t block = run.first, end = block + run.count; block < end;) {
    const int64_t group = block / run.piece, next = (group + 1) * run.piece < end ? (group + 1) * run.piece : end;
    __m256 low[C][R], high[C][R];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) low[c][r] = high[c][r] = _mm256_setzero_ps();
#pragma GCC unroll 1
    for (; block < next; ++block) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from[c]));
        const __m256i words = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(packed), bytes), masks);
        const __m256 w0 = _mm256_sub_ps(_mm256_castsi256_ps(_mm256_unpacklo_epi16(words, exponents)), lows);
        const __m256 w1 = _mm256_sub_ps(_mm256_castsi256_ps(_mm256_unpackhi_epi16(words, exponents)), lows);
        from[c] += stride;
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          low[c][r] = _mm256_fmadd_ps(w0, _mm256_loadu_ps(x[r]), low[c][r]);
          high[c][r] = _mm256_fmadd_ps(w1, _mm256_loadu_ps(x[r] + 8), high[c][r]);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) x[r] += 16;
    }
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const __m256 scale = run.scales ? _mm256_broadcast_ss(run.scales[c] + group) : _mm256_set1_ps(1);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const __m256 sum = _mm256_add_ps(low[c][r], high[c][r]);
        totals[c * R + r] = _mm256_fmadd_ps(sum, scale, totals[c * R + r]);
      }
    }
  }
}

// C rows of weights from number `first`, R of floats.
template <int C, int R>
void multiply_floats(const WeightRows& weights, int64_t first, int64_t columns, int64_t group, const float* const* x,
                     float* sums) {
  const int bits = weights.bits;
  const uint8_t* const* packed = weights.packed + first;
  const float* const* scales = group ? weights.scales + first : nullptr;
  const int64_t blocks = (columns + 15) / 16, piece = group ? group / 16 : blocks + 1;
  int64_t whole = blocks;
  for (int c = 0; c < C; ++c)
    while (whole > 0 && packed[c] + 2 * bits * (whole - 1) + 16 > weights.end) --whole;
  __m256 totals[C * R] = {};
  add_blocks<C, R>({packed, scales, x, bits, 0, whole, piece}, totals);
  if (whole < blocks) {  // less than 16 bytes: from copies, with zeros behind
    uint8_t last[C][32] = {};
    const uint8_t* from[C];
    const float* by[R];
    for (int c = 0; c < C; ++c)
      from[c] = static_cast<uint8_t*>(
          __builtin_memcpy(last[c], packed[c] + 2 * bits * whole, weights.row_bytes - 2 * bits * whole));
    for (int r = 0; r < R; ++r) by[r] = x[r] + 16 * whole;
    add_blocks<C, R>({from, scales, by, bits, whole, blocks - whole, piece}, totals);
  }
  for (int four = 0; four < C * R; four += 4) {
    float some[4];
    _mm_storeu_ps(some, sums_of(totals + four));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sums[(four + i) % R * weights.count + first + (four + i) / R] = some[i];
  }
}

}  // namespace

bool split_digits_avx2(const float* x, int bits, const Digits& to) { return split_digits<Lane, WIDTH>(x, bits, to); }

bool split_bytes_avx2(const uint8_t* bytes, int zero, int bits, const Digits& to) {
  return split_bytes<Lane, WIDTH>(bytes, zero, bits, to);
}

void dot_digits_avx2(const WeightRows& weights, const Digits* x, int64_t rows, float* sums) {
  const int bits = weights.bits;
  const auto one = bits == 1 ? multiply_fours<1, 1> : bits == 2 ? multiply_fours<2, 1> : multiply_fours<4, 1>;
  const auto two = bits == 1 ? multiply_fours<1, 2> : bits == 2 ? multiply_fours<2, 2> : multiply_fours<4, 2>;
  const auto three = bits == 1 ? multiply_fours<1, 3> : bits == 2 ? multiply_fours<2, 3> : multiply_fours<4, 3>;
  const auto four = bits == 1 ? multiply_fours<1, 4> : bits == 2 ? multiply_fours<2, 4> : multiply_fours<4, 4>;
  const auto dot = x->count == 1 ? one : x->count == 2 ? two : x->count == 3 ? three : four;
  for (int64_t r = 0; r < rows; ++r) dot(weights, x[r], sums + r * weights.count);
}

void dot_avx2(const WeightRows& weights, int64_t columns, int64_t group, const float* const* x, int64_t rows,
              float* sums) {
  const auto of_rows = [&](auto multiply, int tile, int64_t r) {
    float* of_r = sums + r * weights.count;
    for (int64_t c = 0; c < weights.count; c += tile) multiply(weights, c, columns, group, x + r, of_r);
  };
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) of_rows(multiply_floats<2, 4>, 2, r);
  for (; r + 2 <= rows; r += 2) of_rows(multiply_floats<2, 2>, 2, r);
  for (; r < rows; ++r) of_rows(multiply_floats<4, 1>, 4, r);
}

}  // namespace bitorch_engine
