// A few rows of float activations times a packed weight: the weight is read once, in the order in which it is stored.
#pragma once

#include <cstdint>

#include "runtime/table.h"

namespace bitorch_engine {

// sum over k of code[k] * x[k], where the codes are a packed stream of `bits` bits each; count a multiple of 8.
using DotFunction = float (*)(const uint8_t* packed, const float* x, int64_t count, int bits);

float dot_scalar(const uint8_t* packed, const float* x, int64_t count, int bits);
float dot_avx512(const uint8_t* packed, const float* x, int64_t count, int bits);

extern const Kernel<DotFunction> dot_kernel;

}  // namespace bitorch_engine
