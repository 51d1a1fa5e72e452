// One optimizer step over a weight of 1 to 8 bits, its residual and its moments; ops/reference/update.py is the
// definition, and every kernel gives its bits.
#pragma once

#include <cstdint>

#include "runtime/table.h"

namespace bitorch_engine {

// How a moment is stored. ops/cpu/update.py has the same numbers. A second moment with one float a row is none here: it
// enters the rates.
enum MomentKind : int { NONE = 0, MOMENT_F32 = 1, MOMENT_BF16 = 2, MOMENT_F16 = 3, MOMENT_8BIT = 4 };

constexpr int64_t BLOCK = 128;      // elements that share a unit in an 8-bit moment, and that a kernel takes at a time
constexpr int64_t BLOCK_ROW = 132;  // bytes of a block of an 8-bit moment: the codes, then the unit

inline constexpr int moment_bytes(MomentKind kind) {  // of a block
  return kind == MOMENT_F32 ? 4 * BLOCK : kind == MOMENT_8BIT ? BLOCK_ROW : kind == NONE ? 0 : 2 * BLOCK;
}

// What is the same for all blocks of a step.
struct StepRule {
  int bits;
  float beta1, rest1, beta2, rest2;  // rest: 1 - beta
  float least;                       // added to the root of the second moment
  float grad_factor;
  int grad_bf16;  // the gradient is bfloat16, not float32
  MomentKind first, second;
  uint32_t key;
};

// `count` blocks in a row. rate: units of 2**-23 levels a unit of the gradient, 128 floats for a block; those of the
// next block lie rate_stride behind, 0 where all blocks lie in one row.
struct Blocks {
  uint8_t *packed, *residual;
  const void* grad;
  void *first, *second;
  const float* rate;
  int64_t rate_stride;
  int64_t start, count;  // index of the first element, for its noise; number of blocks
};

using UpdateFunction = void (*)(const StepRule& rule, const Blocks& blocks);

void update_scalar(const StepRule& rule, const Blocks& blocks);
void update_avx2(const StepRule& rule, const Blocks& blocks);
void update_avx512(const StepRule& rule, const Blocks& blocks);

// Mean square of `count` elements times the factor, added up in the order of the reference's tree_sum.
// scratch: mean_square_scratch(count) floats. ahead: where one begins to ask for a quarter of a later row, and of three
// more, `stride` bytes apart.
using MeanSquareFunction = float (*)(const void* grad, int bf16, float factor, int64_t count, float* scratch,
                                     const void* ahead, int64_t stride);

inline constexpr int64_t mean_square_scratch(int64_t count) {  // the power of two from there on
  int64_t floats = 1;
  while (floats < count) floats *= 2;
  return floats;
}

float mean_square_scalar(const void* grad, int bf16, float factor, int64_t count, float* scratch, const void* ahead,
                         int64_t stride);
float mean_square_avx2(const void* grad, int bf16, float factor, int64_t count, float* scratch, const void* ahead,
                       int64_t stride);
float mean_square_avx512(const void* grad, int bf16, float factor, int64_t count, float* scratch, const void* ahead,
                         int64_t stride);

// Whether all elements lie between -limit and limit, a number; false for NaN.
using WithinFunction = bool (*)(const float* values, int64_t count, float limit);

bool within_scalar(const float* values, int64_t count, float limit);
bool within_avx2(const float* values, int64_t count, float limit);
bool within_avx512(const float* values, int64_t count, float limit);

extern const Kernel<UpdateFunction> update_kernel;
extern const Kernel<MeanSquareFunction> mean_square_kernel;
extern const Kernel<WithinFunction> within_kernel;

}  // namespace bitorch_engine
