// 3x3 convolutions with a quarter of the products: Winograd's minimal filtering F(4x4, 3x3) (Lavin and Gray, "Fast
// Algorithms for Convolutional Neural Networks", CVPR 2016, section 4.2), in whole numbers, and so exact.
//
// A tile of 4 x 4 results reads 6 x 6 pixels u, and takes 36 products of each channel where there were 144:
//
//   576 * results = A ((G w G^T) * (B u B^T)) A^T        * number by number; summed over channels before A
//
//       [ 3  0  0 ]        [ 4  0 -5  0  1  0 ]
//       [ 1  1  1 ]        [ 0 -4 -4  1  1  0 ]        [ 2 -4 -4  1  1  0 ]
//   G = [ 1 -1  1 ]    B = [ 0  4 -4 -1  1  0 ]    A = [ 0 -4  4  2 -2  0 ]
//       [ 1  2  4 ]        [ 0 -2 -1  2  1  0 ]        [ 0 -4 -4  4  4  0 ]
//       [ 1 -2  4 ]        [ 0  2 -1 -2  1  0 ]        [ 0 -4  4  8 -8  8 ]
//       [ 0  0  3 ]        [ 0  4  0 -5  0  1 ]
//
// which is 24 times the usual, with the fractions of G moved to A. Weights of 8 bits become at most 49 * 128, and bytes
// at most 68 * 255: both fit 16 bits, and `vpmaddwd` multiplies those half as fast as bytes. Sums may overflow 32 bits,
// for they are right modulo 2^32, and the results are found in that: times the inverse of 9, then shifted by 6 bits. So
// results have 26 bits; of wide weights and many channels there are more, and some channels are added up at a time.
#pragma once

#include <cstdint>
#include <vector>

#include "runtime/table.h"

namespace bitorch_engine {

struct Call;
struct Phase;
struct Product;
struct Region;

namespace winograd {

constexpr int64_t SIDE = 4;            // results of a tile, one way
constexpr int64_t READ = 6;            // pixels that they read
constexpr int64_t PLACES = READ * READ;  // products of a channel
constexpr int64_t UNIT = 16;           // channels of the image are padded to a multiple of it
constexpr uint32_t INVERSE_OF_9 = 0x38e38e39;
// Rows of A have a factor in common that is left out until the end: 1, 2, 4 and 4.
constexpr int SHIFT[SIDE] = {0, 1, 2, 2};

// What is made of 36 numbers each has a pitch: so far apart, in numbers, are those of one of the 36 from those of the
// next. Were it a multiple of 2048, they would all be in the same few lines of the L1 cache.
static inline int64_t pitch_of(int64_t numbers) { return numbers + 32; }

// G w G^T of some channels of one block of 16 result channels, out[36][padded / 2][16][2], from [9][depth / 4][16][4]
// as qconv/arrange.cpp has it, of which the 9 are `step` apart. depth: a multiple of 4; channels from there to `padded`
// become 0. The pitch is that of padded * 16.
using WeightsFunction = void (*)(const int8_t* block, int64_t step, int64_t depth, int64_t padded, int16_t* out);
// B u B^T of some channels of one tile, out[36][depth]. Pixel (i, j) is at lines[i] + columns[j].
using PixelsFunction = void (*)(const uint8_t* const* lines, const int64_t* columns, int64_t depth, int16_t* out,
                                int64_t pitch);
// sums[36][tiles][16] of products, or added to them: pixels[36][tiles][depth] of that pitch times weights as above.
using MultiplyFunction = void (*)(const int16_t* pixels, int64_t pitch, const int16_t* weights, int64_t tiles,
                                  int64_t depth, bool added, int32_t* sums);
// The results of tiles first .. first + count - 1 of `tiles`, or what is added to them: (4, 4 * count) rows of qconv's
// COLUMNS numbers.
using TotalsFunction = void (*)(const int32_t* sums, int64_t tiles, int64_t first, int64_t count, bool added,
                                int32_t* totals);

#define BE_WINOGRAD(isa)                                                                                         \
  void weights_##isa(const int8_t* block, int64_t step, int64_t depth, int64_t padded, int16_t* out);            \
  void pixels_##isa(const uint8_t* const* lines, const int64_t* columns, int64_t depth, int16_t* out,            \
                    int64_t pitch);                                                                              \
  void multiply_##isa(const int16_t* pixels, int64_t pitch, const int16_t* weights, int64_t tiles, int64_t depth, \
                      bool added, int32_t* sums);                                                                \
  void totals_##isa(const int32_t* sums, int64_t tiles, int64_t first, int64_t count, bool added, int32_t* totals);
BE_WINOGRAD(scalar)
BE_WINOGRAD(avx2)
#undef BE_WINOGRAD

extern const Kernel<WeightsFunction> weights_kernel;
extern const Kernel<PixelsFunction> pixels_kernel;
extern const Kernel<MultiplyFunction> multiply_kernel;
extern const Kernel<TotalsFunction> totals_kernel;

// Whether the phase is such a convolution, and faster so than in those regions. pairs: of pairs_that_fit.
bool suits(const Product& product, const Phase& phase, const std::vector<Region>& regions, int64_t pairs);
// All of its results.
void multiply_all(const Call& call, const Phase& phase, int threads);

}  // namespace winograd
}  // namespace bitorch_engine
