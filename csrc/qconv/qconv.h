// Integer convolution of an unsigned 8-bit image with a weight of 1 to 8 bits.
#pragma once

#include <cstdint>

#include "quantize/quantize.h"
#include "runtime/geometry.h"
#include "runtime/table.h"
#include "runtime/watch.h"

namespace bitorch_engine {

// The signed code of index 0; at 1 bit the codes are -1 and +1.
static constexpr int lowest_code(int bits) { return bits == 1 ? -1 : -(1 << (bits - 1)); }

// So many sums of two products fit 16 bits together, where factors are no larger than these.
static inline int64_t pairs_that_fit(int64_t largest, int64_t largest_weight) {
  return 32767 / (2 * largest * largest_weight);
}

struct Results;

// What a kernel leaves set up from tile to tile, on one thread: the shape of the matrix unit's registers, which takes
// as long to change as they take for a thousand products of each result.
struct Setup {
  int64_t shape = 0;
  void (*release)() = nullptr;  // to be called in the end, where it is set

  Setup() = default;
  Setup(const Setup&) = delete;
  ~Setup() {
    if (release) release();
  }
};

// Where products read that follow each other in memory, in bytes: from a pixel, and from the first weight of a block.
struct Read {
  int64_t image, weights;
};

// One tile of the product: `count` image pixels times `blocks` blocks of 16 result channels.
//   totals[i][o] = sum over reads r, k < depth of rows[i][r.image + k] * weights[o / 16][r.weights / 16 + k][o % 16]
// where weights is as in arrange.cpp, as signed bytes, each block block_bytes long, and totals is (count, COLUMNS)
// int32. With `results`, they are given the totals, all at once or part by part, and what is left in `totals` is of no
// use.
struct Tile {
  const uint8_t* const* rows;
  int64_t count;  // at most ROWS
  const Read* reads;
  int64_t read_count, depth;  // depth: of a read, a multiple of 4
  const int8_t* weights;
  int64_t block_bytes, blocks;  // blocks: at most COLUMNS / 16
  int32_t* totals;
  // The rows as runs of at most 16 that are equally far apart, for the matrix unit; others need no runs.
  const uint8_t* runs;
  int64_t run_count;
  int64_t pairs;  // of pairs_that_fit
  const Results* results;  // or null
  Setup* setup;
};
using MultiplyFunction = void (*)(const Tile& tile);

// Index values of `bits` bits, a packed stream, to signed codes. count: a multiple of 1024.
using DecodeFunction = void (*)(const uint8_t* packed, int64_t count, int bits, int8_t* codes);

// What is made of totals:
//   (float(total - zero_sum[o]) * factor[o]) * sample_factor + bias[o] + poison
struct Epilogue {
  const int32_t* zero_sum;
  const float* factor;
  const float* bias;  // or null
  float poison;
  // One of these: floats, or bytes clamp(rint(value) + zero).
  Dtype dtype;
  bool bytes;
  int zero;
};
// Rows of totals, of one sample, whose results lie at equal distances in memory.
struct Stretch {
  int64_t count;
  uint8_t* out;  // of channel 0; null: they have no results, and step is 0
  int64_t step;  // bytes from row to row; where it is one element, channels are not last
  const float* sample_factor;  // or null
};
// totals: from channel `first` on, while what is in the epilogue begins with channel 0. channel_stride: in elements.
using FinishFunction = void (*)(const int32_t* totals, const Stretch& rows, int64_t first, int64_t channels,
                                const Epilogue& epilogue, int64_t channel_stride);

// Rows of [channel][tap] bytes to rows of [tap][channel].
using SplitFunction = void (*)(const uint8_t* rows, int64_t count, int64_t channels, int64_t taps, uint8_t* out);

#define BE_QCONV(isa)                                                                                       \
  void multiply_##isa(const Tile& tile);                                                                    \
  void decode_##isa(const uint8_t* packed, int64_t count, int bits, int8_t* codes);                         \
  void finish_##isa(const int32_t* totals, const Stretch& rows, int64_t first, int64_t channels,            \
                    const Epilogue& epilogue, int64_t channel_stride);
BE_QCONV(scalar)
BE_QCONV(avx2)
BE_QCONV(avx512)
#undef BE_QCONV
void multiply_amx(const Tile& tile);
void split_scalar(const uint8_t* rows, int64_t count, int64_t channels, int64_t taps, uint8_t* out);
void split_avx2(const uint8_t* rows, int64_t count, int64_t channels, int64_t taps, uint8_t* out);
void split_avx512(const uint8_t* rows, int64_t count, int64_t channels, int64_t taps, uint8_t* out);

extern const Kernel<MultiplyFunction> multiply_kernel;
extern const Kernel<DecodeFunction> decode_kernel;
extern const Kernel<FinishFunction> finish_kernel;
extern const Kernel<SplitFunction> split_kernel;

// The arguments of be_qconv and be_depthwise that are not tensors of a layer; ops/cpu/conv.py has the same fields.
struct QconvArguments {
  Geometry geometry;
  int64_t scatter, rows_are_results;  // see product.h
  int64_t source;                     // SourceKind
  int64_t x_dtype, x_sample, x_channel, x_step[3];  // floats: dtype and strides in elements
  int64_t x_bits;                                   // bits of the activation's codes
  int64_t w_bits, w_arranged_bits;
  int64_t out_dtype, out_bytes, out_zero, out_sample, out_channel, out_step[3];
  int64_t threads;
};

// All that a call of be_qconv, be_depthwise or be_binary_conv reads but x, for layers that are called again and again;
// ops/cpu/plans.py has the same fields.
struct Planned {
  Watch watch;
  const void* arguments;
  const float *scale, *low;
  const void* weights;
  const int32_t* sums;
  const float *factor, *bias;
};

}  // namespace bitorch_engine
