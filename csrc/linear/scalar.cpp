#include "bits/bits.h"
#include "linear/digits.h"
#include "linear/linear.h"
#include "qconv/qconv.h"

namespace bitorch_engine {
namespace {

constexpr int64_t WIDTH = 32;

using Lane = int32_t;

}  // namespace

bool split_digits_scalar(const float* x, int bits, const Digits& to) { return split_digits<Lane, WIDTH>(x, bits, to); }

void split_bytes_scalar(const uint8_t* bytes, int zero, int bits, const Digits& to) {
  split_bytes<Lane, WIDTH>(bytes, zero, bits, to);
}

void dot_digits_scalar(const uint8_t* const* weights, int64_t channels, int64_t row_bytes, int bits, const Digits* x,
                       int64_t rows, float* sums) {
  const int64_t per_byte = 8 / bits, group_bytes = GROUP / per_byte;
  const int step = bits == 1 ? 2 : 1, mask = (1 << bits) - 1;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < channels; ++c) {
      const int8_t* digits = x[r].digits;
      float sum = 0;
      for (int64_t g = 0; g * GROUP < x[r].columns; ++g) {
        int32_t totals[3] = {};
        for (int d = 0; d < x[r].count; ++d) {
          Lane lanes[WIDTH / sizeof(Lane)];
          std::memcpy(lanes, x[r].corrections + (3 * g + d) * WIDEST, WIDTH);
          for (Lane lane : lanes) totals[d] += lane;
        }
        for (int64_t start = g * group_bytes; start < (g + 1) * group_bytes; start += WIDTH)
          for (int64_t j = 0; j < per_byte; ++j, digits += x[r].count * WIDTH)
            for (int64_t i = 0; i < WIDTH && start + i < row_bytes; ++i)
              for (int d = 0; d < x[r].count; ++d)
                totals[d] += (weights[c][start + i] >> (j * bits) & mask) * step * digits[d * WIDTH + i];
        for (int d = 0; d < x[r].count; ++d) sum += static_cast<float>(totals[d]) * x[r].scales[3 * g + d];
      }
      sums[r * channels + c] = sum;
    }
}

// Sixteen partial sums, as vectors have them: one alone would lose accuracy over thousands of products.
float dot_scalar(const uint8_t* packed, const float* x, int64_t count, int bits) {
  constexpr int64_t PIECE = 512;
  const int low = lowest_code(bits), step = bits == 1 ? 2 : 1;
  uint8_t index[PIECE];
  float sums[16] = {};
  for (int64_t start = 0; start < count; start += PIECE) {
    const int64_t some = count - start < PIECE ? count - start : PIECE;
    unpack_kernel.pick()(packed + start / 8 * bits, index, some, bits);
    for (int64_t k = 0; k < some; ++k) sums[k % 16] += static_cast<float>(index[k] * step + low) * x[start + k];
  }
  float sum = 0;
  for (float part : sums) sum += part;
  return sum;
}

}  // namespace bitorch_engine
