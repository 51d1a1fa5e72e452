// Depthwise convolutions with a *square* of taps, three rows of three side by side, whose sums fit 16 bits: most of
// those that networks have. Pixels are interleaved once, when the slab is filled, and not again for each row of each
// result:
//
//   line of pairs  [block of 32 lanes][pair of pixels][lane][2]   unsigned bytes, lanes in the order of `place_in_pair`
//   weight         [block of 32 lanes][row of taps][4][lane][2]   signed bytes, in the same order
//
// A result begins with the first pixel of a pair or with the second. Of each row the weights are those of taps (0, 1)
// and (2, none) of a pair and the next one, for the former, and (none, 0) and (1, 2), for the latter.
#pragma once

#include <cstdint>

#include "depthwise/depthwise.h"
#include "quantize/quantize.h"
#include "runtime/table.h"

namespace bitorch_engine {

// Where a lane begins in the 64 bytes of a pair: lanes 0-3, 8-11, 4-7, 12-15, and again from 16 on. Of their 16-bit
// sums, interleaving within 128-bit lanes makes lanes 0-7, and 8-15, side by side.
static constexpr int64_t place_in_pair(int64_t lane) {
  const int64_t four = lane / 4 % 4, place = four == 1 ? 2 : four == 2 ? 1 : four;
  return lane / 16 * 32 + place * 8 + lane % 4 * 2;
}

constexpr int64_t SQUARE_ROW = 4 * 2 * LANE_BLOCK, SQUARE_BYTES = 3 * SQUARE_ROW;  // of the weights of a block of lanes

// Where of a row's weights each of its taps is, for results of either kind.
constexpr int64_t PLACES_OF_TAP[3][2] = {{0, 2 * 2 * LANE_BLOCK + 1},
                                         {1, 3 * 2 * LANE_BLOCK},
                                         {2 * LANE_BLOCK, 3 * 2 * LANE_BLOCK + 1}};

// Result pixels of a line, as of DepthwiseLines.
struct SquareLine {
  const uint8_t* rows[3];  // lines of pairs that the rows of taps read, from their first pixel on
  int64_t block_step;      // bytes from one block of lanes to the next
  bool strided;            // every other pixel has a result
  int64_t pixels, channels;
  const int8_t* weights;
  const int32_t* start;
  const float *factor, *bias;
  float* out;
  int64_t pitch;
};
using SquareFunction = void (*)(const SquareLine& line);

// A line of pixels, an even number, to a line of pairs. lanes: a multiple of LANE_BLOCK.
using PairFunction = void (*)(const uint8_t* line, int64_t pixels, int64_t lanes, uint8_t* pairs);

// A line of float32 with `before` zeros in front of it, and as many behind it as `padded` pixels have, an even number.
struct FloatLine {
  const float* x;
  int64_t pixels, pixel_stride, channels;
  int64_t before, padded;
};
// Quantizes it, to more than one bit, to a line of pairs. Returns whether a value is not finite.
using QuantizePairsFunction = bool (*)(const FloatLine& line, ActivationRule rule, uint8_t* pairs);

#define BE_SQUARE(isa)                                                                          \
  void square_##isa(const SquareLine& line);                                                    \
  void pair_pixels_##isa(const uint8_t* line, int64_t pixels, int64_t lanes, uint8_t* pairs);   \
  bool quantize_pairs_##isa(const FloatLine& line, ActivationRule rule, uint8_t* pairs);
BE_SQUARE(scalar)
BE_SQUARE(avx2)
BE_SQUARE(avx512)
#undef BE_SQUARE

extern const Kernel<SquareFunction> square_kernel;
extern const Kernel<PairFunction> pair_pixels_kernel;
extern const Kernel<QuantizePairsFunction> quantize_pairs_kernel;

}  // namespace bitorch_engine
