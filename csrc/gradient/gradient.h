// What happens to gradients around the integer products: rounding them to codes on the way in, and the straight-through
// mask of the activation quantizer on the way out. ops/reference/{gradient,activation}.py define both.
#pragma once

#include <cstdint>

#include "runtime/table.h"

namespace bitorch_engine {

// Largest magnitudes of a (rows, columns) matrix by column: largest[c] = max(largest[c], |x[r, c]|); of one line: the
// result. NaN is larger than everything.
using LargestByColumnFunction = void (*)(const float* x, int64_t rows, int64_t columns, float* largest);
using LargestFunction = float (*)(const float* x, int64_t count);

// Codes of a run of values: value * factor * inverse, rounded stochastically, at most limit in size. The noise of value
// i is that of index first + i * stride. factor and inverse: one a value, or one for all (step 0).
struct Rounding {
  const float* factor;
  int64_t factor_step;
  const float* inverse;
  int64_t inverse_step;
  float limit;
  uint32_t seed;
};
using RoundFunction = void (*)(const float* x, int64_t count, const Rounding& rounding, uint64_t first, uint64_t stride,
                               int8_t* codes);

// grad where the activation was inside the range, 0 where it was clipped; returns the sum of grad * slope, the gradient
// of the scale before its normalization.
using StraightThroughFunction = double (*)(const float* grad, const uint8_t* index, const uint8_t* beyond,
                                           int64_t count, float low, int bits, float* out);

#define BE_GRADIENT(isa)                                                                                           \
  void largest_by_column_##isa(const float* x, int64_t rows, int64_t columns, float* largest);                     \
  float largest_##isa(const float* x, int64_t count);                                                              \
  void round_##isa(const float* x, int64_t count, const Rounding& rounding, uint64_t first, uint64_t stride,       \
                   int8_t* codes);                                                                                 \
  double straight_through_##isa(const float* grad, const uint8_t* index, const uint8_t* beyond, int64_t count,     \
                                float low, int bits, float* out);
BE_GRADIENT(scalar)
BE_GRADIENT(avx2)
BE_GRADIENT(avx512)
BE_GRADIENT(neon)
#undef BE_GRADIENT

extern const Kernel<LargestByColumnFunction> largest_by_column_kernel;
extern const Kernel<LargestFunction> largest_kernel;
extern const Kernel<RoundFunction> round_kernel;
extern const Kernel<StraightThroughFunction> straight_through_kernel;

}  // namespace bitorch_engine
