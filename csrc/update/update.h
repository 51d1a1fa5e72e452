// One optimizer step of packed weights in one pass; bitorch_engine/ops/reference/update.py defines it, bit for bit.
#pragma once

#include <cstdint>

#include "quantize/quantize.h"
#include "runtime/table.h"

namespace bitorch_engine {

// How a moment is stored; see ops/reference/moments.py. CHANNEL: float32, one second moment a row.
enum MomentKind : int { NO_MOMENT = 0, MOMENT_FLOAT32, MOMENT_BFLOAT16, MOMENT_FLOAT16, MOMENT_8BIT, MOMENT_CHANNEL };

// ops/cpu/update.py has the same fields. All factors are rounded to float32 as torch rounds its scalars.
struct UpdateArguments {
  uint8_t* packed;
  uint8_t* residual;
  const float* scale;  // one a row
  const void* grad;    // (rows, columns)
  void* exp_avg_s;
  void* exp_avg_l;
  int64_t rows, columns;
  int64_t grad_dtype, s_kind, l_kind, bits, threads;
  int64_t add;  // 1: grad is what is added to the weight; no moments
  uint32_t moment_key, code_key;
  float levels_per_scale;  // (1 << hidden bits) / format.step
  float lr, grad_factor, beta1, one_minus_beta1, beta2, one_minus_beta2, inverse_correction1, inverse_correction2, eps,
      inverse_columns;
};

// Elements first .. last - 1, first a multiple of 128. rates: levels per unit of direction, one a row.
using UpdateFunction = void (*)(const UpdateArguments& arguments, const float* rates, int64_t first, int64_t last);
// Advances the second moments of rows first .. last - 1 by the mean square of their gradient.
using RowMomentFunction = void (*)(const UpdateArguments& arguments, float* scratch, int64_t first, int64_t last);

#define BE_UPDATE(isa)                                                                                       \
  void update_##isa(const UpdateArguments& arguments, const float* rates, int64_t first, int64_t last);      \
  void row_moment_##isa(const UpdateArguments& arguments, float* scratch, int64_t first, int64_t last);
BE_UPDATE(scalar)
BE_UPDATE(avx2)
BE_UPDATE(avx512)
BE_UPDATE(neon)
#undef BE_UPDATE

extern const Kernel<UpdateFunction> update_kernel;
extern const Kernel<RowMomentFunction> row_moment_kernel;

}  // namespace bitorch_engine
