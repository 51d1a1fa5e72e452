// Activations become codes, rounded to nearest, into channels-last bytes; and codes become floats.
#pragma once

#include <cstdint>

#include "runtime/table.h"

namespace bitorch_engine {

enum Dtype : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };  // ops/cpu/loading.py has the same numbers

// index = clamp(rint(x * inverse_scale) - low, 0, 2**bits - 1); at 1 bit: x >= 0. NaN becomes the code 0 (at 1 bit,
// +1). What is written is index * step. See ops/reference/activation.py.
struct ActivationRule {
  float inverse_scale;
  float low;
  int bits;
  int step;
};

// Quantizes `pixels` x `channels` values, which lie at x + pixel * pixel_stride + channel * channel_stride (strides in
// elements), to out[pixel * out_stride + channel]. beyond: bytes 0 or 1 in the layout of out, or null for none.
// Returns whether one of the values is not finite.
using QuantizeActivationFunction = bool (*)(const void* x, Dtype dtype, int64_t pixel_stride, int64_t channel_stride,
                                            int64_t pixels, int64_t channels, ActivationRule rule, uint8_t* out,
                                            int64_t out_stride, uint8_t* beyond);

bool quantize_activation_scalar(const void* x, Dtype dtype, int64_t pixel_stride, int64_t channel_stride,
                                int64_t pixels, int64_t channels, ActivationRule rule, uint8_t* out,
                                int64_t out_stride, uint8_t* beyond);

bool quantize_activation_avx2(const void* x, Dtype dtype, int64_t pixel_stride, int64_t channel_stride, int64_t pixels,
                              int64_t channels, ActivationRule rule, uint8_t* out, int64_t out_stride, uint8_t* beyond);

bool quantize_activation_avx512(const void* x, Dtype dtype, int64_t pixel_stride, int64_t channel_stride,
                                int64_t pixels, int64_t channels, ActivationRule rule, uint8_t* out,
                                int64_t out_stride, uint8_t* beyond);

extern const Kernel<QuantizeActivationFunction> quantize_activation_kernel;

// out[i] = (index[i] + lowest) * factor; at 1 bit twice the index. Only the product rounds.
using FloatsFunction = void (*)(const uint8_t* index, int64_t count, int bits, float lowest, float factor, float* out);

void floats_scalar(const uint8_t* index, int64_t count, int bits, float lowest, float factor, float* out);
void floats_avx2(const uint8_t* index, int64_t count, int bits, float lowest, float factor, float* out);

extern const Kernel<FloatsFunction> floats_kernel;

}  // namespace bitorch_engine
