// Convolutions of floats with packed weights, where pixels have so few channels that torch's convolution leaves much of
// the processor idle: the first layer of a network above all. Lines of pixels are copied between zeros, so that the
// products of any result pixel are at the same distances from it; the weights become floats.
//
//   memory order    lanes of a vector   weights                                    line of pixels
//   channels last   output channels     [block of 16 channels][product][channel]   [pixel][input channel]
//   NCHW            result pixels       [channel][product]                         [channel][x % stride][x / stride]
#pragma once

#include <cstdint>

#include "runtime/table.h"

namespace bitorch_engine {

constexpr int64_t FLOAT_BLOCK = 16;  // channels of a block, and pixels that may be read beyond a line's

// Results of one line:
//   start[o] + sum over k < depth of values[k][x * step] * weight[k, o]
// to out[x * pitch + o] channels last, with `weights` and `start` of whole blocks; else to out[o * pitch + x], and step
// is 1.
struct ConvLine {
  bool channels_last;
  const float* const* values;
  int64_t depth, step, pixels;
  const float *weights, *start;
  int64_t channels;
  float* out;
  int64_t pitch;
};
using MultiplyLineFunction = void (*)(const ConvLine& line);

void multiply_line_scalar(const ConvLine& line);
void multiply_line_avx2(const ConvLine& line);
void multiply_line_avx512(const ConvLine& line);

extern const Kernel<MultiplyLineFunction> multiply_line_kernel;

}  // namespace bitorch_engine
