// A few rows of float activations times a packed weight: the weight is read once, in the order in which it is stored.
//
// Of 1, 2 and 4 bits, a byte of the stream holds 8, 4 or 2 whole values. There the products are those of bytes: columns
// fall into groups of 512, in each of which the activations become integers, q = rint(x / s), of 24 bits,
//
//   q = 65536 * high + 256 * middle + low,   each digit a signed byte,
//
// which is as exact as float32 unless a group has values that are far larger than the others: a weight may be 0 there,
// and the others then have fewer digits than they need. Activations with such values get one digit more. Sums of
// code * digit are exact; a sum of a group becomes float, once for each digit, and is multiplied by s. Without the low
// digit, with 16 bits, it takes three quarters of the time.
// Weights of the other widths become floats, and so do all where the digits of activations would not be exact.
#pragma once

#include <cstdint>

#include "runtime/table.h"

namespace bitorch_engine {

constexpr int64_t GROUP = 512;       // columns whose activations have one scale
constexpr int64_t WIDEST = 64;       // bytes of a vector, at most

static inline bool has_whole_values(int bits) { return bits == 1 || bits == 2 || bits == 4; }

// Columns whose sums become float together: as many as have one scale of activations and of weights, but no fewer than
// a vector of `width` bytes has.
static inline int64_t piece_columns(int64_t group, int bits, int64_t width) {
  const int64_t vector = 8 * width / bits;
  return group == 0 || group > GROUP ? GROUP : group < vector ? vector : group;
}

// One row of activations, as a kernel with vectors of `width` bytes reads it:
//   digits       [vector of `width` packed bytes][position of a value in its byte][digit, the lowest first][width]
//                only those vectors that have columns
//   corrections  [piece][digit][width bytes]: the lowest code times the sum of the digits that a lane of the kernel's
//                sums adds. Sums of index * digit begin with it. It has 32 bits, in AVX2 16: two products of each of
//                16 positions, (0 .. 15) - 8 times -128 .. 127, fit unless all are the largest.
//   scales       [group of 512 columns][digit]
struct Digits {
  int8_t* digits;
  uint8_t* corrections;
  float* scales;
  int64_t columns;
  int64_t group;  // columns with one scale of weights, a power of two from 32; 0: all
  int count;      // of digits: 1 to 4
  uint32_t powers;  // half of the activations must be above the largest of 512, divided by 2**powers
};

// Returns false where a value is not finite or tiny, or where the largest of a group is above about 2**powers ordinary
// ones (is_even of digits.h), or where sums would not fit. Up to a power of 4 rounding to three digits, s / sqrt(12),
// moves an ordinary value by at most nine times 2**-24 of it, which is about half of what float32 sums of some hundred
// products are off; rounding to two, nine times 2**-16. With one digit more, powers may be 12.
using SplitDigitsFunction = bool (*)(const float* x, int bits, const Digits& to);

// bytes[k] - zero as one digit or two, exact. Products and sums are integers, so that floats hold them exactly below
// 2**24. Returns false where one digit is too short.
using SplitBytesFunction = bool (*)(const uint8_t* bytes, int zero, int bits, const Digits& to);

constexpr int CHANNELS = 4;       // rows of weights that are multiplied at a time

// Rows of packed codes, and where they have groups their scales, which lie in order; else null.
struct WeightRows {
  const uint8_t* const* packed;
  const float* const* scales;
  int64_t count, row_bytes;  // count: a multiple of CHANNELS
  int bits;
  const uint8_t* end;  // of the memory that may be read
};

// sums[r * count + c] = sum over k of weight[c][k] * x[r][k], for at most MOST_CHANNELS weights and MOST_ROWS of x.
constexpr int64_t MOST_CHANNELS = 32, MOST_ROWS = 8;
using DotDigitsFunction = void (*)(const WeightRows& weights, const Digits* x, int64_t rows, float* sums);

// The same of floats and weights of any width, times the scale of their group: group as in Digits; with 0 there are no
// scales, and columns may be any number: zeros follow those of x up to a multiple of COLUMN_BLOCK, and what follows the
// last column in its byte of a row of weights does not matter.
constexpr int64_t COLUMN_BLOCK = 16;
using DotFunction = void (*)(const WeightRows& weights, int64_t columns, int64_t group, const float* const* x,
                             int64_t rows, float* sums);

#define BE_LINEAR(isa)                                                                                         \
  bool split_digits_##isa(const float* x, int bits, const Digits& to);                                         \
  bool split_bytes_##isa(const uint8_t* bytes, int zero, int bits, const Digits& to);                          \
  void dot_digits_##isa(const WeightRows& weights, const Digits* x, int64_t rows, float* sums);                \
  void dot_##isa(const WeightRows& weights, int64_t columns, int64_t group, const float* const* x, int64_t rows, \
                 float* sums);
BE_LINEAR(scalar)
BE_LINEAR(avx2)
BE_LINEAR(avx512)
#undef BE_LINEAR

extern const Kernel<SplitDigitsFunction> split_digits_kernel;
extern const Kernel<SplitBytesFunction> split_bytes_kernel;
extern const Kernel<DotDigitsFunction> dot_digits_kernel;
extern const Kernel<DotFunction> dot_kernel;

}  // namespace bitorch_engine
