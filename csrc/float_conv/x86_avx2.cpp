#include <immintrin.h>

#include "float_conv/tiles.h"

namespace bitorch_engine {
namespace {

// Six rows of two vectors: 12 sums and the operands of a product are in 15 of 16 registers, and 12 multiplications, at
// two a cycle, take longer than 9 loads.
template <int ROWS, int VECTORS, bool CHANNELS_LAST>
void multiply_tile(const Tile& tile) {
  const Tile t = tile;  // in registers, whatever is stored
  __m256 sums[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v)
      sums[i][v] = CHANNELS_LAST ? _mm256_loadu_ps(t.start + 8 * v) : _mm256_broadcast_ss(t.start + i);
  for (int64_t k = 0; k < t.depth; ++k) {
    const float *lanes = lanes_of<CHANNELS_LAST>(t, k), *row = rows_of<CHANNELS_LAST>(t, k);
    __m256 vector[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) vector[v] = _mm256_loadu_ps(lanes + 8 * v);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i, row += t.step) {
      const __m256 value = _mm256_broadcast_ss(row);
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) sums[i][v] = _mm256_fmadd_ps(value, vector[v], sums[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) _mm256_storeu_ps(t.out + i * t.pitch + 8 * v, sums[i][v]);
}

template <bool LAST>
constexpr TileFunction wide[] = {multiply_tile<1, 2, LAST>, multiply_tile<2, 2, LAST>, multiply_tile<3, 2, LAST>,
                                 multiply_tile<4, 2, LAST>, multiply_tile<5, 2, LAST>, multiply_tile<6, 2, LAST>};
template <bool LAST>
constexpr TileFunction slim[] = {multiply_tile<1, 1, LAST>, multiply_tile<2, 1, LAST>, multiply_tile<3, 1, LAST>,
                                 multiply_tile<4, 1, LAST>, multiply_tile<5, 1, LAST>, multiply_tile<6, 1, LAST>,
                                 multiply_tile<7, 1, LAST>, multiply_tile<8, 1, LAST>};

}  // namespace

void multiply_line_avx2(const ConvLine& line) {
  if (line.channels_last)
    multiply_line(line, {16, 6, wide<true>}, {8, 8, slim<true>});
  else
    multiply_line(line, {16, 6, wide<false>}, {8, 8, slim<false>});
}

}  // namespace bitorch_engine
