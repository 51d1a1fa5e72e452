#include "linear/digits.h"
#include "linear/floats.h"
#include "linear/linear.h"
#include "qconv/qconv.h"

namespace bitorch_engine {
namespace {

constexpr int64_t WIDTH = 32;

using Lane = int32_t;

// Sixteen partial sums, as vectors have them: one alone would lose accuracy over thousands of products.
void add_floats(const uint8_t* index, int64_t start, int64_t count, int bits, const float* scales, int64_t group,
                const float* const* x, float* sums) {
  const int low = lowest_code(bits), step = bits == 1 ? 2 : 1;
  float parts[16] = {};
  for (int64_t k = 0; k < count; ++k) {
    const float scale = group ? scales[(start + k) / group] : 1.0f;
    parts[k % 16] += static_cast<float>(index[k] * step + low) * scale * x[0][start + k];
  }
  for (float part : parts) sums[0] += part;
}

}  // namespace

bool split_digits_scalar(const float* x, int bits, const Digits& to) { return split_digits<Lane, WIDTH>(x, bits, to); }

bool split_bytes_scalar(const uint8_t* bytes, int zero, int bits, const Digits& to) {
  return split_bytes<Lane, WIDTH>(bytes, zero, bits, to);
}

void dot_digits_scalar(const WeightRows& weights, const Digits* x, int64_t rows, float* sums) {
  constexpr int64_t SIZE = sizeof(Lane), LANES = WIDTH / SIZE;
  const int bits = weights.bits, per_byte = 8 / bits, step = bits == 1 ? 2 : 1, mask = (1 << bits) - 1;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < weights.count; ++c) {
      const int count = x[r].count;
      const int64_t piece = piece_columns(x[r].group, bits, WIDTH);
      const int8_t* digits = x[r].digits;
      const uint8_t* corrections = x[r].corrections;
      float sum = 0;
      for (int64_t first = 0; first < x[r].columns; first += piece, corrections += count * WIDTH) {
        const int64_t left = weights.row_bytes - first / per_byte,
                      bytes = left < piece / per_byte ? left : piece / per_byte;
        const uint8_t* packed = weights.packed[c] + first / per_byte;
        Lane lanes[4][LANES];
        std::memcpy(lanes, corrections, count * WIDTH);
        for (int64_t start = 0; start < bytes; start += WIDTH)
          for (int j = 0; j < per_byte; ++j)
            for (int d = 0; d < count; ++d, digits += WIDTH)
              for (int64_t i = 0; i < WIDTH && start + i < bytes; ++i)
                lanes[d][i / SIZE] += (packed[start + i] >> (j * bits) & mask) * step * digits[i];
        const float* scales = x[r].scales + first / GROUP * count;
        for (int64_t lane = 0; lane < LANES && lane * SIZE < bytes; ++lane) {
          float part = 0;
          for (int d = 0; d < count; ++d) part += static_cast<float>(lanes[d][lane]) * scales[d];
          const int64_t column = first + lane * SIZE * per_byte;
          sum += weights.scales ? part * weights.scales[c][column / x[r].group] : part;
        }
      }
      sums[r * weights.count + c] = sum;
    }
}

void dot_scalar(const WeightRows& weights, int64_t columns, int64_t group, const float* const* x, int64_t rows,
                float* sums) {
  add_up(add_floats, nullptr, nullptr, weights, columns, group, x, rows, sums);
}

}  // namespace bitorch_engine
