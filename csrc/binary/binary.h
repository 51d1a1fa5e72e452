// Convolution of 1-bit activations with 1-bit weights: codes are -1 and +1, bit 1 stands for +1.
//
//   sum of K products of codes = K - 2 * popcount(activation bits ^ weight bits)
//
// K counts the taps that lie inside the image only: pixels are grouped by the set of those taps, and what is padding is
// not computed at all. Where channels do not fill their last word, both operands have 0 there, which adds nothing.
#pragma once

#include <cstdint>

#include "quantize/quantize.h"
#include "runtime/table.h"

namespace bitorch_engine {
namespace binary {

constexpr int64_t WORD = 32;        // channels of one pixel whose bits lie together
constexpr int64_t LANES = 16;       // result channels whose words lie together
constexpr int64_t MOST_BLOCKS = 4;  // blocks of LANES that a tile has at most; twice as many where lookup stores floats
constexpr int64_t MOST_PIXELS = 6;  // and pixels; with one vector a block they fill the registers of AVX-512

// A run of words that lie together in the image and in the weight: the taps of one row of a kernel, or one tap.
struct Segment {
  int64_t image;    // where it starts, in words from a pixel's base
  int64_t weights;  // in words of one lane
  int64_t words;
};

// One tile of the product: pixels at equal distances that read the same taps, times blocks of 16 result channels.
//   differing[i][o] = sum over segments s, words k of
//     popcount(image[i * image_step + s.image + k] ^ weights[o / 16 * block_words + (s.weights + k) * 16 + o % 16])
//   total[i][o] = products - 2 * differing[i][o]
struct Tile {
  const uint32_t* image;
  int64_t image_step;
  int64_t count;  // pixels: 1 to MOST_PIXELS
  const Segment* segments;
  int64_t segment_count;
  const uint32_t* weights;
  int64_t block_words;
  int64_t blocks;  // see MOST_BLOCKS
  int32_t products;
  // One of these: floats, total * factor[o] + added[o], pixels out_step apart; or totals, (count, COLUMNS) int32.
  float* out;
  int64_t out_step;
  const float* factor;
  const float* added;  // or null
  int32_t* totals;
};
using MultiplyFunction = void (*)(const Tile& tile);

// Bits x * inverse_scale >= 0 (NaN: 1) of `pixels` x `channels` values at x + pixel * pixel_stride + channel *
// channel_stride (in elements), to out[pixel * out_stride + channel / 32], whole words, 0 where channels end.
// Returns whether one of the values is not finite.
struct Floats {
  const void* x;
  Dtype dtype;
  int64_t pixel_stride, channel_stride, pixels, channels;
  float inverse_scale;
};
using SignFunction = bool (*)(const Floats& floats, uint32_t* out, int64_t out_stride);

// One row of the canonical weight, bit `first` + channel * taps + tap of `row`, to one lane of a block:
// out[(tap * words + channel / 32) * 16], bit channel % 32, where words = ceil(channels / 32). `row` may be read for
// 64 bytes behind its end.
using ArrangeFunction = void (*)(const uint8_t* row, int first, int64_t channels, int64_t taps, uint32_t* out);

#define BE_BINARY(isa)                                                      \
  void multiply_##isa(const Tile& tile);                                    \
  bool sign_##isa(const Floats& floats, uint32_t* out, int64_t out_stride); \
  void arrange_##isa(const uint8_t* row, int first, int64_t channels, int64_t taps, uint32_t* out);
BE_BINARY(scalar)
BE_BINARY(avx2)
BE_BINARY(avx512)
#undef BE_BINARY
void multiply_neon(const Tile& tile);
bool sign_neon(const Floats& floats, uint32_t* out, int64_t out_stride);

extern const Kernel<MultiplyFunction> multiply_kernel;
extern const Kernel<SignFunction> sign_kernel;
extern const Kernel<ArrangeFunction> arrange_kernel;

}  // namespace binary
}  // namespace bitorch_engine
