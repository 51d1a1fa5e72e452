// Products of floats, of codes that are decoded some at a time for all rows. Included once per instruction set.
#include "bits/bits.h"
#include "linear/linear.h"

namespace bitorch_engine {
namespace {

// Adds the products of columns start .. start + count - 1, whose weights are `index`, to the sums of some rows.
using AddFunction = void (*)(const uint8_t* index, int64_t start, int64_t count, int bits, const float* scales,
                             int64_t group, const float* const* x, float* sums);

// Of one row of weights. one, two, four: of so many rows; two and four may be null.
inline void add_up_row(AddFunction one, AddFunction two, AddFunction four, const uint8_t* packed, int64_t count,
                       int bits, const float* scales, int64_t group, const float* const* x, int64_t rows, float* sums) {
  constexpr int64_t DECODED = 2048;
  uint8_t decoded[DECODED];
  for (int64_t r = 0; r < rows; ++r) sums[r] = 0;
  for (int64_t start = 0; start < count; start += DECODED) {
    const int64_t some = count - start < DECODED ? count - start : DECODED;
    const uint8_t* index = packed + start / 8 * bits;
    if (bits != 8) {
      unpack_range(index, 0, some, bits, decoded);
      index = decoded;
    }
    for (int64_t r = 0, many; r < rows; r += many) {
      many = four && rows - r >= 4 ? 4 : two && rows - r >= 2 ? 2 : 1;
      (many == 4 ? four : many == 2 ? two : one)(index, start, some, bits, scales, group, x + r, sums + r);
    }
  }
}

inline void add_up(AddFunction one, AddFunction two, AddFunction four, const WeightRows& weights, int64_t columns,
                   int64_t group, const float* const* x, int64_t rows, float* sums) {
  for (int64_t c = 0; c < weights.count; ++c) {
    float of_row[MOST_ROWS];
    add_up_row(one, two, four, weights.packed[c], columns, weights.bits, weights.scales ? weights.scales[c] : nullptr,
               group, x, rows, of_row);
    for (int64_t r = 0; r < rows; ++r) sums[r * weights.count + c] = of_row[r];
  }
}

}  // namespace
}  // namespace bitorch_engine
