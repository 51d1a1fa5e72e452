#include <immintrin.h>

#include "float_conv/tiles.h"

namespace bitorch_engine {
namespace {

// Twelve rows of two vectors: 24 sums, and 24 multiplications for 15 loads.
template <int ROWS, int VECTORS, bool CHANNELS_LAST>
void multiply_tile(const Tile& tile) {
  const Tile t = tile;  // in registers, whatever is stored
  // From a vector to the next.
  const int64_t further = CHANNELS_LAST ? t.depth * FLOAT_BLOCK : FLOAT_BLOCK;
  __m512 sums[ROWS][VECTORS];
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v)
      sums[i][v] = CHANNELS_LAST ? _mm512_loadu_ps(t.start + 16 * v) : _mm512_set1_ps(t.start[i]);
  for (int64_t k = 0; k < t.depth; ++k) {
    const float *lanes = lanes_of<CHANNELS_LAST>(t, k), *row = rows_of<CHANNELS_LAST>(t, k);
    __m512 vector[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) vector[v] = _mm512_loadu_ps(lanes + further * v);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i, row += t.step) {
      const __m512 value = _mm512_set1_ps(*row);
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) sums[i][v] = _mm512_fmadd_ps(value, vector[v], sums[i][v]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) _mm512_storeu_ps(t.out + i * t.pitch + 16 * v, sums[i][v]);
}

template <int VECTORS, bool LAST>
constexpr TileFunction tiles[] = {
    multiply_tile<1, VECTORS, LAST>,  multiply_tile<2, VECTORS, LAST>,  multiply_tile<3, VECTORS, LAST>,
    multiply_tile<4, VECTORS, LAST>,  multiply_tile<5, VECTORS, LAST>,  multiply_tile<6, VECTORS, LAST>,
    multiply_tile<7, VECTORS, LAST>,  multiply_tile<8, VECTORS, LAST>,  multiply_tile<9, VECTORS, LAST>,
    multiply_tile<10, VECTORS, LAST>, multiply_tile<11, VECTORS, LAST>, multiply_tile<12, VECTORS, LAST>};

}  // namespace

void multiply_line_avx512(const ConvLine& line) {
  if (line.channels_last)
    multiply_line(line, {32, 12, tiles<2, true>}, {16, 12, tiles<1, true>});
  else
    multiply_line(line, {32, 12, tiles<2, false>}, {16, 12, tiles<1, false>});
}

}  // namespace bitorch_engine
