// The gradient of a 3x3 weight from quantized gradients, likewise: F(3x3, 4x4), whose 9 results, the taps, come of
// 6 x 6 pixels u and 4 x 4 gradients g by 36 products instead of 144. With B as in winograd.h,
//
//   576 * results = A ((G g G^T) * (B u B^T)) A^T        * number by number; summed over tiles before A
//
//       [ 3  0  0  0 ]
//       [ 1  1  1  1 ]        [ 2 -4 -4  1  1  0 ]
//   G = [ 1 -1  1 -1 ]    A = [ 0 -4  4  2 -2  0 ]
//       [ 1  2  4  8 ]        [ 0 -4 -4  4  4  8 ]
//       [ 1 -2  4 -8 ]
//       [ 0  0  0  3 ]
//
// Gradients of 8 bits become at most 225 * 128, which fits 16 bits. What a product sums over are tiles, of which two
// lie side by side, [place of 36][pair of tiles][16 channels][2], on both sides.
#pragma once

#include "winograd/winograd.h"

namespace bitorch_engine {
namespace winograd {

constexpr int64_t TAPS = 9;
constexpr int64_t SQUARE = SIDE * SIDE;  // gradients of a tile

// B u B^T of 16 channels of two tiles, out[36][16][2], of which the 36 are `pitch` apart. Pixel (i, j) of tile t is at
// lines[t][i] + columns[t][j].
using PixelPairFunction = void (*)(const uint8_t* const (*lines)[READ], const int64_t (*columns)[READ], int16_t* out,
                                   int64_t pitch);
// G g G^T of 16 channels of two tiles, out likewise, from gradients[tile][4 * y + x][16].
using GradientPairFunction = void (*)(const int8_t (*gradients)[SQUARE][UNIT], int16_t* out, int64_t pitch);
// sums[36][16 results][16 channels] of products over so many pairs of tiles; the 36 of either side are `pitch` apart.
using MultiplyPairsFunction = void (*)(const int16_t* gradients, const int16_t* pixels, int64_t pairs, int64_t pitch,
                                       int32_t* sums);
// taps[16 results][9][16 channels] of such sums.
using TapsFunction = void (*)(const int32_t* sums, int32_t* taps);

#define BE_WINOGRAD(isa)                                                                                          \
  void pixel_pair_##isa(const uint8_t* const (*lines)[READ], const int64_t (*columns)[READ], int16_t* out,        \
                        int64_t pitch);                                                                           \
  void gradient_pair_##isa(const int8_t (*gradients)[SQUARE][UNIT], int16_t* out, int64_t pitch);                 \
  void multiply_pairs_##isa(const int16_t* gradients, const int16_t* pixels, int64_t pairs, int64_t pitch,        \
                            int32_t* sums);                                                                       \
  void taps_##isa(const int32_t* sums, int32_t* taps);
BE_WINOGRAD(scalar)
BE_WINOGRAD(avx2)
#undef BE_WINOGRAD

extern const Kernel<PixelPairFunction> pixel_pair_kernel;
extern const Kernel<GradientPairFunction> gradient_pair_kernel;
extern const Kernel<MultiplyPairsFunction> multiply_pairs_kernel;
extern const Kernel<TapsFunction> taps_kernel;

// Whether the gradient of the weight of this convolution is faster so. largest: of the image's bytes.
bool suits_gradient(const Product& product, int64_t largest);

// totals[result channel][tap][channel] = sum over pixels of (image - zero) * gradient.
// gradients: signed bytes (batch, result pixels, all result channels).
void sum_gradient(const Product& product, const uint8_t* image, int zero, const int8_t* gradients, int32_t* totals,
                  int threads);

}  // namespace winograd
}  // namespace bitorch_engine
