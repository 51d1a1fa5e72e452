#include <cstring>

#include "qconv/product.h"
#include "winograd/gradient.h"
#include "winograd/winograd.h"

namespace bitorch_engine {
namespace winograd {
namespace {

constexpr int32_t G[READ][3] = {{3, 0, 0}, {1, 1, 1}, {1, -1, 1}, {1, 2, 4}, {1, -2, 4}, {0, 0, 3}};
constexpr int32_t B[READ][READ] = {{4, 0, -5, 0, 1, 0},  {0, -4, -4, 1, 1, 0}, {0, 4, -4, -1, 1, 0},
                                   {0, -2, -1, 2, 1, 0}, {0, 2, -1, -2, 1, 0}, {0, 4, 0, -5, 0, 1}};
// Without the factors of SHIFT.
constexpr int32_t A[SIDE][READ] = {{2, -4, -4, 1, 1, 0}, {0, -2, 2, 1, -1, 0},
                                   {0, -1, -1, 1, 1, 0}, {0, -1, 1, 2, -2, 2}};

// Those of the weight's gradient.
constexpr int32_t GRADIENT_G[READ][SIDE] = {{3, 0, 0, 0}, {1, 1, 1, 1}, {1, -1, 1, -1},
                                            {1, 2, 4, 8}, {1, -2, 4, -8}, {0, 0, 0, 3}};
constexpr int32_t GRADIENT_A[3][READ] = {{2, -4, -4, 1, 1, 0}, {0, -2, 2, 1, -1, 0}, {0, -1, -1, 1, 1, 2}};

// out = M in M^T, modulo 2^32.
template <int64_t ROWS, int64_t SIZE>
void transform(const int32_t (&m)[ROWS][SIZE], const uint32_t (&in)[SIZE][SIZE], uint32_t (&out)[ROWS][ROWS]) {
  for (int64_t i = 0; i < ROWS; ++i)
    for (int64_t j = 0; j < ROWS; ++j) {
      out[i][j] = 0;
      for (int64_t a = 0; a < SIZE; ++a)
        for (int64_t b = 0; b < SIZE; ++b) out[i][j] += static_cast<uint32_t>(m[i][a] * m[j][b]) * in[a][b];
    }
}

}  // namespace

void weights_scalar(const int8_t* block, int64_t step, int64_t depth, int64_t padded, int16_t* out) {
  const int64_t pitch = pitch_of(padded * BLOCK);
  std::memset(out, 0, PLACES * pitch * sizeof *out);
  for (int64_t c = 0; c < depth; ++c)
    for (int64_t o = 0; o < BLOCK; ++o) {
      uint32_t w[3][3], of[READ][READ];
      for (int64_t t = 0; t < 9; ++t)
        w[t / 3][t % 3] = static_cast<uint32_t>(block[t * step + c / 4 * 4 * BLOCK + o * 4 + c % 4]);
      transform(G, w, of);
      for (int64_t i = 0; i < PLACES; ++i)
        out[i * pitch + c / 2 * 2 * BLOCK + o * 2 + c % 2] = static_cast<int16_t>(of[i / READ][i % READ]);
    }
}

void pixels_scalar(const uint8_t* const* lines, const int64_t* columns, int64_t depth, int16_t* out, int64_t pitch) {
  for (int64_t c = 0; c < depth; ++c) {
    uint32_t u[READ][READ], of[READ][READ];
    for (int64_t i = 0; i < PLACES; ++i) u[i / READ][i % READ] = lines[i / READ][columns[i % READ] + c];
    transform(B, u, of);
    for (int64_t i = 0; i < PLACES; ++i) out[i * pitch + c] = static_cast<int16_t>(of[i / READ][i % READ]);
  }
}

void multiply_scalar(const int16_t* pixels, int64_t pitch, const int16_t* weights, int64_t tiles, int64_t depth,
                     bool added, int32_t* sums) {
  for (int64_t i = 0; i < PLACES; ++i, pixels += pitch, weights += pitch_of(depth * BLOCK))
    for (int64_t t = 0; t < tiles; ++t)
      for (int64_t o = 0; o < BLOCK; ++o, ++sums) {
        uint32_t sum = added ? static_cast<uint32_t>(*sums) : 0;
        for (int64_t c = 0; c < depth; ++c)
          sum += static_cast<uint32_t>(pixels[t * depth + c] * weights[c / 2 * 2 * BLOCK + o * 2 + c % 2]);
        *sums = static_cast<int32_t>(sum);
      }
}

void totals_scalar(const int32_t* sums, int64_t tiles, int64_t first, int64_t count, bool added,
                   int32_t* totals) {
  for (int64_t t = 0; t < count; ++t)
    for (int64_t o = 0; o < BLOCK; ++o) {
      uint32_t in[READ][READ], of[SIDE][SIDE];
      for (int64_t i = 0; i < PLACES; ++i)
        in[i / READ][i % READ] = static_cast<uint32_t>(sums[(i * tiles + first + t) * BLOCK + o]);
      transform(A, in, of);
      for (int64_t y = 0; y < SIDE; ++y)
        for (int64_t x = 0; x < SIDE; ++x) {
          int32_t& total = totals[(y * SIDE * count + t * SIDE + x) * COLUMNS + o];
          total = (added ? total : 0) + (static_cast<int32_t>(of[y][x] * INVERSE_OF_9) >> (6 - SHIFT[y] - SHIFT[x]));
        }
    }
}

void pixel_pair_scalar(const uint8_t* const (*lines)[READ], const int64_t (*columns)[READ], int16_t* out,
                       int64_t pitch) {
  for (int64_t t = 0; t < 2; ++t) {
    int16_t one[PLACES * UNIT];
    pixels_scalar(lines[t], columns[t], UNIT, one, UNIT);
    for (int64_t i = 0; i < PLACES; ++i)
      for (int64_t c = 0; c < UNIT; ++c) out[i * pitch + 2 * c + t] = one[i * UNIT + c];
  }
}

void gradient_pair_scalar(const int8_t (*gradients)[SQUARE][UNIT], int16_t* out, int64_t pitch) {
  for (int64_t t = 0; t < 2; ++t)
    for (int64_t c = 0; c < UNIT; ++c) {
      uint32_t g[SIDE][SIDE], of[READ][READ];
      for (int64_t i = 0; i < SQUARE; ++i) g[i / SIDE][i % SIDE] = static_cast<uint32_t>(gradients[t][i][c]);
      transform(GRADIENT_G, g, of);
      for (int64_t i = 0; i < PLACES; ++i) out[i * pitch + 2 * c + t] = static_cast<int16_t>(of[i / READ][i % READ]);
    }
}

void multiply_pairs_scalar(const int16_t* gradients, const int16_t* pixels, int64_t pairs, int64_t pitch,
                           int32_t* sums) {
  for (int64_t i = 0; i < PLACES; ++i, gradients += pitch, pixels += pitch)
    for (int64_t o = 0; o < UNIT; ++o)
      for (int64_t c = 0; c < UNIT; ++c) {
        uint32_t sum = 0;
        for (int64_t t = 0; t < 2 * pairs; ++t) {
          const int64_t at = t / 2 * 2 * UNIT + t % 2;
          sum += static_cast<uint32_t>(gradients[at + 2 * o] * pixels[at + 2 * c]);
        }
        *sums++ = static_cast<int32_t>(sum);
      }
}

void taps_scalar(const int32_t* sums, int32_t* taps) {
  for (int64_t o = 0; o < UNIT; ++o)
    for (int64_t c = 0; c < UNIT; ++c) {
      uint32_t in[READ][READ], of[3][3];
      for (int64_t i = 0; i < PLACES; ++i)
        in[i / READ][i % READ] = static_cast<uint32_t>(sums[(i * UNIT + o) * UNIT + c]);
      transform(GRADIENT_A, in, of);
      for (int64_t t = 0; t < TAPS; ++t)
        taps[(o * TAPS + t) * UNIT + c] =
            static_cast<int32_t>(of[t / 3][t % 3] * INVERSE_OF_9) >> (6 - SHIFT[t / 3] - SHIFT[t % 3]);
    }
}

}  // namespace winograd
}  // namespace bitorch_engine
