// Convolutions whose groups have few channels, depthwise ones above all: a lane of a vector is a result channel, and
// products are summed over taps alone. What a lane needs from each image channel of its group lies at the lane's place:
//
//   slab    (padded pixel, image channel of the group, lane)        unsigned bytes, lanes padded to a multiple of 32
//   weight  [phase][block of 32 lanes][pair of products][lane][2]   signed bytes, lanes in the order of `place_of_lane`
//
// A product is one tap and one image channel of the group. Two of them are multiplied together; where their number is
// odd, the last one's partner has weights of 0.
#pragma once

#include <cstdint>

#include "runtime/table.h"

namespace bitorch_engine {

constexpr int64_t LANE_BLOCK = 32;
constexpr int64_t MARGIN = 64;  // bytes behind the last pixel of a slab, or of a line, that kernels may read

// Where a lane's pair begins in the 64 bytes of a block: lanes 0-7, 16-23, 8-15, 24-31, as interleaving bytes within
// 128-bit lanes gives them.
static inline int64_t place_of_lane(int64_t lane) {
  const int64_t eight = lane / 8;
  return (eight == 1 ? 2 : eight == 2 ? 1 : eight) * 16 + lane % 8 * 2;
}

// Result pixels of some lines, all lanes:
//   out[y * line_pitch + x * pitch + o] =
//     float(start[o] + sum over k of base[y * line_step + x * step + o + offsets[k]] * weight[k][o])
//       * factor[o] + bias[o]
struct DepthwiseLines {
  const uint8_t* base;
  const int64_t* offsets;  // 2 * pairs of them
  int64_t pairs, step, pixels;
  int64_t lines, line_step;
  int64_t channels;  // lanes that are written; start, factor and bias have whole blocks, or bias is null
  const int8_t* weights;
  const int32_t* start;  // what takes the zero point away again; smaller than the largest sum of all products
  const float *factor, *bias;
  int64_t fit;  // so many pairs have sums that fit 16 bits together; 0: not even one. `start` added, they still do
  float* out;
  int64_t pitch, line_pitch;
};
using DepthwiseFunction = void (*)(const DepthwiseLines& line);

// The weight's gradient, one block of lanes, pixels of one line:
//   totals[0][o] += sum over x of row(x, o)
//   totals[1 + k][o] += sum over x of row(x, o) * base[x * step + o + offsets[k]]
// where row(x, o) = rows[x * pitch + o] - row_zero, o < 32, totals are [1 + products][32].
struct DepthwiseGradientLine {
  const uint8_t* base;
  const int64_t* offsets;
  int64_t products, step, pixels;
  const uint8_t* rows;
  int64_t pitch;
  int row_zero;
  int32_t* totals;
};
using DepthwiseGradientFunction = void (*)(const DepthwiseGradientLine& line);

#define BE_DEPTHWISE(isa)                                 \
  void depthwise_##isa(const DepthwiseLines& line);        \
  void depthwise_gradient_##isa(const DepthwiseGradientLine& line);
BE_DEPTHWISE(scalar)
BE_DEPTHWISE(avx2)
BE_DEPTHWISE(avx512)
#undef BE_DEPTHWISE

extern const Kernel<DepthwiseFunction> depthwise_kernel;
extern const Kernel<DepthwiseGradientFunction> depthwise_gradient_kernel;

}  // namespace bitorch_engine
